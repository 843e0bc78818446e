"""What does the model write next, with the memory and without it?

Greedy continuation of a text under each condition, special tokens left out, and the first token at which they part.
Cost: one forward per token and condition. Misleads: one early difference changes everything after it, so the length of
the agreement says little about size.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from engram_interp.hooks.ablation import ablate
from engram_interp.hooks.statistics import MemoryStatistics
from engram_interp.models.protocol import MemoryModel
from engram_interp.models.text import show_tokens, start_tokens


@dataclass(frozen=True)
class Continuations:
    """Tokens written after a text; `parted` is the first index at which they differ, None where they never do."""

    condition: str
    with_memory: tuple[str, ...]
    without: tuple[str, ...]

    @property
    def parted(self) -> int | None:
        """Index of the first different token."""
        return next((i for i, (a, b) in enumerate(zip(self.with_memory, self.without, strict=True)) if a != b), None)


def continuations(
    model: MemoryModel,
    text: str,
    *,
    kind: str = "output_zero",
    steps: int = 16,
    statistics: MemoryStatistics | None = None,
    blocks: tuple[int, ...] | None = None,
    **options: Any,
) -> Continuations:
    """Continue a text greedily, with the memory and under an ablation.

    Args: kind, statistics, blocks, options: see `engram_interp.hooks.ablate`; a text longer than the context loses its
        beginning.
    Raises: ValueError for an empty text, steps that do not fit the context, or an ablation the model cannot have.
    """
    ids = model.tokenizer.encode(text, add_special_tokens=False).ids
    room = model.context - len(start_tokens(model)) - steps
    if not ids or not 1 <= steps <= model.context // 2:
        raise ValueError(
            f"expected a text, and 1 to {model.context // 2} steps; found {len(ids)} tokens and {steps} steps"
        )
    prompt = [*start_tokens(model), *ids[-room:]]
    special = torch.tensor(
        [i for i, t in model.tokenizer.get_added_tokens_decoder().items() if t.special], dtype=torch.int64
    )
    written = []
    for arm in range(2):
        tokens = list(prompt)
        for _ in range(steps):
            change = ablate(model, kind, blocks=blocks, statistics=statistics, **options) if arm else nullcontext()
            with change, torch.no_grad():
                logits = model(torch.tensor([tokens]))[0, -1]
                tokens.append(int(logits.index_fill(0, special, -torch.inf).argmax()))
        written.append(tuple(show_tokens(model.tokenizer, tokens[len(prompt) :])))
    return Continuations(kind, *written)
