"""Which sequences are read together?

Those of similar length, padded on the right by repeating their last token: in a causal model nothing before a pad can see it, so
every position that is kept has the value it has alone, up to the rounding of products of another shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Protocol, TypeVar, runtime_checkable

import torch

from engram_interp.shapes import Int64, Tensor

BATCH_TOKENS = 4096


@runtime_checkable
class _HasTokens(Protocol):
    @property
    def tokens(self) -> Sized: ...


S = TypeVar("S", bound=_HasTokens)


def batches(sequences: Iterable[S], batch_tokens: int = BATCH_TOKENS) -> Iterator[list[S]]:
    """Sequences of similar length together, at most `batch_tokens` with padding (or one sequence); equal lengths keep their order."""
    batch: list[S] = []
    for sequence in sorted(sequences, key=lambda s: len(s.tokens)):
        if batch and (len(batch) + 1) * len(sequence.tokens) > batch_tokens:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def right_padded(rows: Sequence[Sequence[int]]) -> Int64[Tensor, "B T"]:
    """Rows of equal length; the last token of each is repeated."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[row[-1]] * (length - len(row))] for row in rows])
