"""What does a model know, and what can it only read off its prompt?

A task is a list of items. An item is a prompt and its possible continuations, the right one first: with one
continuation it counts as solved when every token of it is the model's first choice (chance 0), with several when the
right one is the most probable in total (chance 1/n). Families follow section 6.3 of the Engram paper: facts and
phrases, which a memory can hold, against reading, copying, grammar, arithmetic and induction, which it cannot. Misleads
when families differ in chance or in length: compare retained fractions corrected for chance, never raw accuracies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from engram_interp.probes.task_data import DATA_SOURCES
from engram_interp.probes.task_generated import arithmetic_items, gallery_items, induction_items
from engram_interp.probes.task_hub import HUB_PREFIX, hub_items
from engram_interp.probes.task_items import Item


@dataclass(frozen=True)
class Task:
    """Items of one kind; `family` groups tasks that ask for the same ability, `source` says where they come from."""

    name: str
    family: str
    items: tuple[Item, ...]
    source: str

    def __post_init__(self) -> None:
        """Refuse a task without an interval, or with two items of one name."""
        if len(self.items) < 2:
            raise ValueError(f"task {self.name!r}: expected at least 2 items, found {len(self.items)}")
        if len({item.id for item in self.items}) != len(self.items):
            raise ValueError(f"task {self.name!r}: expected items with distinct ids")

    @property
    def chance(self) -> float:
        """Mean score of guessing."""
        return float(np.mean([item.chance for item in self.items]))


_Builder = Callable[[Tokenizer, int, np.random.Generator], list[Item]]
_GENERATED: dict[str, tuple[str, _Builder]] = {
    "gallery_entity": ("phrases", lambda tokenizer, limit, rng: gallery_items("entity", limit)),
    "gallery_phrase": ("phrases", lambda tokenizer, limit, rng: gallery_items("phrase", limit)),
    "induction": ("induction", induction_items),
    "arithmetic": ("arithmetic", lambda tokenizer, limit, rng: arithmetic_items(limit, rng)),
}
GENERATED_TASKS = tuple(_GENERATED)
DATA_TASKS = tuple(DATA_SOURCES)


def load_tasks(
    names: Sequence[str],
    tokenizer: Tokenizer,
    *,
    data: Path | None = None,
    limit: int = 500,
    seed: int = 0,
    distractors: int | None = 3,
) -> list[Task]:
    """Build tasks by name.

    Args: names: of `GENERATED_TASKS` or `DATA_TASKS`, or `hub:NAME` (`probes.task_hub`); data: the folder with
        `eval/*.jsonl.zst`, for the second; limit: items per task, drawn by `seed`; tokenizer: of the model (induction
        repeats its word tokens); distractors: wrong objects beside a fact's right one, None for all of its relation.
    Raises: ValueError for an unknown name, a data task without `data`, or a file that is missing or malformed.
    """
    return [_load(name, tokenizer, data, limit, seed, distractors) for name in names]


def _load(name: str, tokenizer: Tokenizer, data: Path | None, limit: int, seed: int, distractors: int | None) -> Task:
    rng = np.random.default_rng((seed, *name.encode()))
    if name in _GENERATED:
        family, build = _GENERATED[name]
        return Task(
            name, family, tuple(build(tokenizer, limit, rng)), "bundled gallery" if "gallery" in name else "generated"
        )
    if name.startswith(HUB_PREFIX):
        hub, items = hub_items(name, limit, rng)
        return Task(name, hub.family, tuple(items), name.partition("=")[2] or hub.id)
    if name not in DATA_SOURCES:
        raise ValueError(f"unknown task {name!r}: expected one of {', '.join((*GENERATED_TASKS, *DATA_TASKS))}")
    if data is None:
        raise ValueError(f"task {name!r} reads files: give the data folder that holds eval/{DATA_SOURCES[name].file}")
    source = DATA_SOURCES[name]
    return Task(
        name, source.family, tuple(source.items(data / "eval" / source.file, limit, rng, distractors)), source.file
    )
