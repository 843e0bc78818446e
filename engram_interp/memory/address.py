"""Which n-gram is a row the address of, and which rows does an n-gram address?

Forward: the window of compressed ids a hash reads at a position, and its row in every head, in exact integers. Backward
there is no formula: a hash is inverted by a corpus alone (`ngram_counts`). An n-gram is written oldest token first, as
texts of compressed ids joined by ` | `. Misleads: the same words give another n-gram when the tokenizer cuts them
differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int64

from engram_interp.memory.compress import CompressedVocabulary
from engram_interp.memory.hashing import NgramHash

SEPARATOR = " | "


@dataclass(frozen=True)
class SlotAddress:
    """One row: `layer` is the 0-based block, `slot` numbers the rows of one head, `row` those of the flat table."""

    layer: int
    order: int
    head: int
    slot: int
    row: int

    def as_dict(self) -> dict[str, int]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Windows:
    """The n-grams of one order read at every position; `complete` where no position is filled with the pad id."""

    order: int
    ids: Int64[np.ndarray, "T order"]
    complete: Bool[np.ndarray, " T"]


def address_of_row(ngram_hash: NgramHash, layer: int, row: int) -> SlotAddress:
    """Order, head and slot of a row of the flat table.

    Raises: ValueError for a row that no head owns.
    """
    if not 0 <= row < ngram_hash.rows:
        raise ValueError(f"expected a row in [0, {ngram_hash.rows}), found {row}")
    section = int(np.searchsorted(np.asarray(ngram_hash.offsets), row, side="right")) - 1
    order, head = divmod(section, ngram_hash.heads)
    return SlotAddress(layer, ngram_hash.orders[order], head, row - ngram_hash.offsets[section], row)


def addresses_of_ngram(ngram_hash: NgramHash, layer: int, ngram: Sequence[int]) -> tuple[SlotAddress, ...]:
    """The K rows of an n-gram of compressed ids, oldest first.

    Raises: ValueError for an order the hash does not have, or an id outside the compressed vocabulary.
    """
    order = len(ngram)
    if order not in ngram_hash.orders:
        raise ValueError(f"expected an n-gram of {list(ngram_hash.orders)} tokens, found {order}")
    if bad := [i for i in ngram if not 0 <= i < ngram_hash.vocabulary.size]:
        raise ValueError(f"expected compressed ids in [0, {ngram_hash.vocabulary.size}), found {bad[0]}")
    lags = ngram_hash.lags(order)[::-1]
    mix = 0
    for index in range(order):
        mix ^= int(ngram[lags.index(ngram_hash.lag_of_multiplier(index))]) * ngram_hash.multipliers[index]
    return addresses_of_mix(ngram_hash, layer, order, mix)


def addresses_of_mix(ngram_hash: NgramHash, layer: int, order: int, mix: int) -> tuple[SlotAddress, ...]:
    """The K rows that a mix selects: one per head, mix modulo its prime."""
    index = ngram_hash.orders.index(order)
    first = index * ngram_hash.heads
    slots = [mix % prime for prime in ngram_hash.primes[index]]
    return tuple(
        SlotAddress(layer, order, head, slot, ngram_hash.offsets[first + head] + slot)
        for head, slot in enumerate(slots)
    )


def compress(ngram_hash: NgramHash, tokens: Int64[np.ndarray, " T"]) -> Int64[np.ndarray, " T"]:
    """P(x) for one text.

    Raises: ValueError for an id outside the vocabulary.
    """
    return ngram_hash.compress(torch.from_numpy(np.ascontiguousarray(tokens))[None])[0].numpy()


def mixes(ngram_hash: NgramHash, compressed: Int64[np.ndarray, " T"]) -> Int64[np.ndarray, "T N"]:
    """The mix of every order at every position of one text, by the hash itself."""
    return ngram_hash.mix(torch.from_numpy(np.ascontiguousarray(compressed))[None])[0].numpy()


def windows(ngram_hash: NgramHash, compressed: Int64[np.ndarray, " T"]) -> tuple[Windows, ...]:
    """What each order reads at each position of one text, by order."""
    length = len(compressed)
    positions = np.arange(length)
    start = np.zeros(length, dtype=np.int64)
    if ngram_hash.boundary == "reset":
        ends = np.maximum.accumulate(np.where(compressed == ngram_hash.eos, positions, -1))
        start[1:] = ends[:-1] + 1
    found = []
    for order in ngram_hash.orders:
        source = positions[:, None] - np.array(ngram_hash.lags(order)[::-1])
        inside = source >= start[:, None]
        ids = np.where(inside, compressed[source.clip(0)], ngram_hash.pad)
        found.append(Windows(order, ids, np.all(inside, axis=1)))
    return tuple(found)


def ngram_text(vocabulary: CompressedVocabulary, ngram: Sequence[int]) -> str:
    """`alexander | the | great`."""
    return SEPARATOR.join(vocabulary.texts[int(i)] for i in ngram)


def ngram_of_text(vocabulary: CompressedVocabulary, text: str) -> tuple[int, ...]:
    """The compressed ids of an n-gram written as `ngram_text` writes it.

    Raises: ValueError naming a part that is no compressed token.
    """
    ids = {part: i for i, part in enumerate(vocabulary.texts)}
    parts = text.split(SEPARATOR)
    if unknown := [part for part in parts if part not in ids]:
        raise ValueError(f"expected compressed tokens separated by {SEPARATOR!r}, found {unknown[0]!r}")
    return tuple(ids[part] for part in parts)
