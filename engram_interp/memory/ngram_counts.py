"""Which n-grams does a corpus hold, how often, and which of them meet in a row?

A hash cannot be inverted, so "what reads this row" is asked of a corpus: its distinct n-grams with their counts and
mixes. Every window that the hash reads counts, those filled with the pad id at the start of a text included. Two
n-grams share all K rows of an order exactly if their mixes agree modulo the product of its primes, or are equal when
that product exceeds 63 bits (Chinese remainder theorem): that number is the `key`. Cost: one sort of the corpus per
order; `ngram_index` keeps the result on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int64

from engram_interp.memory.address import compress, mixes, windows
from engram_interp.memory.hashing import NgramHash

CHUNK_TOKENS = 2**20


@dataclass(frozen=True, eq=False)
class NgramTable:
    """Distinct n-grams of one order: compressed ids oldest first, mix, number of occurrences."""

    order: int
    ids: Int64[np.ndarray, "G order"]
    mix: Int64[np.ndarray, " G"]
    count: Int64[np.ndarray, " G"]

    def __len__(self) -> int:
        return len(self.mix)

    def choose(self, rows: Int64[np.ndarray, " g"] | Bool[np.ndarray, " G"]) -> NgramTable:
        """Some of the n-grams."""
        return NgramTable(self.order, self.ids[rows], self.mix[rows], self.count[rows])

    def count_of(self, mix: Int64[np.ndarray, " q"]) -> Int64[np.ndarray, " q"]:
        """Occurrences of the n-gram with each mix, 0 if absent; for a table sorted by mix and not empty, as `merge` leaves it."""
        at = np.searchsorted(self.mix, mix).clip(max=len(self) - 1)
        return np.where(self.mix[at] == mix, self.count[at], 0)


@runtime_checkable
class NgramCounts(Protocol):
    """The n-grams of a corpus under one hash. n-grams with one key lie in one part, so parts can be treated one by
    one.
    """

    @property
    def tokens(self) -> int:
        """Tokens of the corpus."""
        ...

    def parts(self, order: int) -> Iterator[NgramTable]:
        """The distinct n-grams of an order, in parts that fit into memory."""
        ...


@dataclass(frozen=True, eq=False)
class NgramsInMemory:
    """The n-grams of a small corpus."""

    tokens: int
    tables: tuple[NgramTable, ...]

    def parts(self, order: int) -> Iterator[NgramTable]:
        """See `NgramCounts.parts`."""
        yield from (table for table in self.tables if table.order == order)


def key_modulus(primes: Sequence[int]) -> int | None:
    """What mixes are compared modulo to tell whether they share all heads; None: compared as they are."""
    modulus = math.lcm(*primes)
    return modulus if modulus < 2**63 else None


def keys(mix: Int64[np.ndarray, " G"], primes: Sequence[int]) -> Int64[np.ndarray, " G"]:
    """Equal exactly for mixes that select the same row in every head."""
    modulus = key_modulus(primes)
    return mix if modulus is None else mix % modulus


def merge(tables: Sequence[NgramTable]) -> NgramTable:
    """Add up the counts of equal n-grams; sorted by mix. Compares ids, so n-grams with one mix stay apart."""
    ids = np.concatenate([table.ids for table in tables])
    mix = np.concatenate([table.mix for table in tables])
    count = np.concatenate([table.count for table in tables])
    order = np.argsort(mix, kind="stable")
    same_mix = mix[order][1:] == mix[order][:-1]
    same_ids = (ids[order][1:] == ids[order][:-1]).all(1)
    if bool((same_mix & ~same_ids).any()):  # two n-grams with one mix: rare, and then they may interleave
        order = np.lexsort((*ids.T[::-1], mix))
        same_ids = (ids[order][1:] == ids[order][:-1]).all(1)
    first = np.flatnonzero(np.concatenate([[True], ~same_ids])) if len(mix) else np.array([], dtype=np.int64)
    totals = np.add.reduceat(count[order], first) if len(mix) else count
    return NgramTable(tables[0].order, ids[order][first], mix[order][first], totals)


def count_chunks(
    ngram_hash: NgramHash, texts: Iterable[Int64[np.ndarray, " _"]], chunk_tokens: int = CHUNK_TOKENS
) -> Iterator[tuple[int, tuple[NgramTable, ...]]]:
    """Tokens and n-gram tables of every order, for about `chunk_tokens` tokens at a time.

    Args: texts: raw token ids of one text each.
    Raises: ValueError for an id outside the vocabulary.
    """
    pending: list[list[NgramTable]] = [[] for _ in ngram_hash.orders]
    tokens = 0
    for text in texts:
        for n, table in enumerate(_of_text(ngram_hash, text)):
            pending[n].append(table)
        tokens += len(text)
        if tokens >= chunk_tokens:
            yield tokens, tuple(merge(tables) for tables in pending)
            pending, tokens = [[] for _ in ngram_hash.orders], 0
    if tokens:
        yield tokens, tuple(merge(tables) for tables in pending)


def _of_text(ngram_hash: NgramHash, text: Int64[np.ndarray, " T"]) -> Iterator[NgramTable]:
    compressed = compress(ngram_hash, text)
    mix = mixes(ngram_hash, compressed)
    for n, window in enumerate(windows(ngram_hash, compressed)):
        yield NgramTable(window.order, window.ids, mix[:, n], np.ones(len(text), dtype=np.int64))


def count_ngrams(
    ngram_hash: NgramHash, texts: Iterable[Int64[np.ndarray, " _"]], chunk_tokens: int = CHUNK_TOKENS
) -> NgramsInMemory:
    """Count a corpus whose distinct n-grams fit into memory (about 50 bytes each).

    Raises: ValueError for a corpus without a token, or an id outside the vocabulary.
    """
    total, tables = 0, None
    for tokens, chunk in count_chunks(ngram_hash, texts, chunk_tokens):
        total += tokens
        tables = chunk if tables is None else tuple(map(merge, zip(tables, chunk, strict=True)))
    if tables is None:
        raise ValueError("expected texts with at least one token, found none")
    return NgramsInMemory(total, tables)


def readers_of_slot(counts: NgramCounts, ngram_hash: NgramHash, order: int, head: int, slot: int) -> NgramTable:
    """The corpus n-grams that read one slot, the most frequent first (the hash inverted, as far as the corpus goes)."""
    prime = ngram_hash.primes[ngram_hash.orders.index(order)][head]
    found = merge([part.choose(part.mix % prime == slot) for part in counts.parts(order)])
    return found.choose(np.argsort(-found.count, kind="stable"))


def sharers(
    counts: NgramCounts, order: int, primes: Sequence[int], mix: Int64[np.ndarray, " q"]
) -> Int64[np.ndarray, " q"]:
    """How many distinct corpus n-grams, itself not counted, select the same row in every head as each of the given
    mixes.
    """
    return _matches(counts, order, mix, lambda m: keys(m, primes)) - present(counts, order, mix)


def present(counts: NgramCounts, order: int, mix: Int64[np.ndarray, " q"]) -> Int64[np.ndarray, " q"]:
    """1 where the corpus holds an n-gram with this mix, else 0 (two n-grams with one 63-bit mix count as one)."""
    return _matches(counts, order, mix, lambda m: m).clip(max=1)


def _matches(
    counts: NgramCounts, order: int, mix: Int64[np.ndarray, " q"], key: Callable[[np.ndarray], np.ndarray]
) -> Int64[np.ndarray, " q"]:
    wanted, where = np.unique(key(mix), return_inverse=True)
    found = np.zeros(len(wanted), dtype=np.int64)
    for part in counts.parts(order):
        part_keys = key(part.mix)
        position = np.searchsorted(wanted, part_keys).clip(max=len(wanted) - 1)
        found += np.bincount(position[wanted[position] == part_keys], minlength=len(wanted))
    return found[where]
