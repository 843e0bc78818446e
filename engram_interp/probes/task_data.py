"""Items from evaluation files: `DATA/eval/*.jsonl.zst`, one JSON object per line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram_interp.gallery.files import read_jsonl
from engram_interp.probes.task_items import Item

_KNOWN_FACT = 3  # training paragraphs that hold subject and object together before a fact counts as learnable
_LEAST_DISTRACTORS = 3  # relations with fewer objects say little

Record = dict[str, object]


@dataclass(frozen=True)
class _Draw:
    """How wrong answers are drawn."""

    distractors: int | None
    rng: np.random.Generator

    def __call__(self, wrong: list[str]) -> list[str]:
        if self.distractors is None:
            return wrong
        return self.rng.choice(wrong, size=min(self.distractors, len(wrong)), replace=False).tolist()


@dataclass(frozen=True)
class DataSource:
    """One evaluation file, the records to keep, and how a record becomes an item."""

    family: str
    file: str
    keep: Callable[[Record], bool]
    item: Callable[[Record, str, list[Record], _Draw], Item | None]

    def items(self, path: Path, limit: int | None, rng: np.random.Generator, distractors: int | None = 3) -> list[Item]:
        """At most `limit` items (None: all), drawn without replacement, in file order; `distractors` as in `load_tasks`.

        Raises: ValueError naming the file and line, or a missing key.
        """
        try:
            records = [(n, r) for n, r in enumerate(read_jsonl(path), start=1) if self.keep(r)]
            every = [r for _, r in records]
            chosen = np.sort(rng.choice(len(records), size=min(limit or len(records), len(records)), replace=False))
            draw = _Draw(distractors, rng)
            made = [self.item(records[i][1], f"{path.name.split('.')[1]}.{records[i][0]}", every, draw) for i in chosen]
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path}: not the expected records ({type(error).__name__}: {error})") from None
        return [item for item in made if item is not None]


def _completion(record: Record, name: str, every: list[Record], draw: _Draw) -> Item:
    return Item(name, str(record["prompt"]), (f" {record['target']}",), str(record["title"]))


def _lambada(record: Record, name: str, every: list[Record], draw: _Draw) -> Item:
    return Item(name, str(record["context"]), (f" {record['target']}",))


def _minimal_pair(record: Record, name: str, every: list[Record], draw: _Draw) -> Item:
    return Item(name, (), (str(record["sentence_good"]), str(record["sentence_bad"])), str(record["UID"]))


def _relation(record: Record, name: str, every: list[Record], draw: _Draw) -> Item | None:
    prompt = str(record["prompts"][0]).replace("{}", str(record["subject"]))  # type: ignore[index]
    others = {str(r["object"]) for r in every if r["relation"] == record["relation"]}
    return _fact(name, prompt, str(record["object"]), others, str(record["relation"]), draw)


def _known(record: Record, name: str, every: list[Record], draw: _Draw) -> Item | None:
    others = {str(r["attribute"]) for r in every if r["relation_id"] == record["relation_id"]}
    return _fact(name, str(record["prompt"]), str(record["attribute"]), others, str(record["relation_id"]), draw)


def _fact(name: str, prompt: str, answer: str, others: set[str], group: str, draw: _Draw) -> Item | None:
    """The answer against others of the same relation; None where the relation has too few."""
    wrong = sorted(others - {answer})
    if len(wrong) < _LEAST_DISTRACTORS:
        return None
    return Item(name, prompt, tuple(f" {text}" for text in (answer, *draw(wrong))), group)


def _learnable(record: Record) -> bool:
    return int(record.get("cooccur_paragraphs_train") or 0) >= _KNOWN_FACT  # type: ignore[call-overload]


DATA_SOURCES = {
    "wiki_entity": DataSource(
        "phrases", "factual.wiki_static_phrase.jsonl.zst", lambda r: r["kind"] == "entity", _completion
    ),
    "wiki_phrase": DataSource(
        "phrases", "factual.wiki_static_phrase.jsonl.zst", lambda r: r["kind"] == "phrase", _completion
    ),
    "lre": DataSource(
        "facts", "factual.lre.jsonl.zst", lambda r: r["category"] == "factual" and _learnable(r), _relation
    ),
    "known_1000": DataSource("facts", "factual.known_1000.jsonl.zst", _learnable, _known),
    "wiki_context_copy": DataSource("reading", "context.wiki_context_copy.jsonl.zst", lambda r: True, _completion),
    "lambada": DataSource(
        "reading", "context.lambada_test.jsonl.zst", lambda r: bool(r["target_in_context"]), _lambada
    ),
    "blimp": DataSource("grammar", "linguistic.blimp.jsonl.zst", lambda r: True, _minimal_pair),
}
