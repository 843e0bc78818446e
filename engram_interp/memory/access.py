"""How evenly are the rows of a table used?

Load of a slot: how many distinct corpus n-grams hash to it; for G n-grams thrown uniformly into p slots it is
binomial(G, 1/p), and G (1 - (1 - 1/p)^(G-1)) of them are expected not to be alone. Access of a slot: how often it is
read; text is Zipfian, so few rows take most reads, and a cache of the hottest rows serves most of them. Cost: one pass
over the n-grams per head. Misleads: hit rates are those of the best fixed cache, chosen after seeing the corpus; a
running cache does a little worse. A Zipf exponent fitted to ranks describes the curve, it does not test for a power
law.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64

from engram_interp.memory.hashing import NgramHash
from engram_interp.memory.ngram_counts import NgramCounts

HIT_RATES = (0.5, 0.8, 0.9, 0.95, 0.99)


def slot_loads(
    counts: NgramCounts, ngram_hash: NgramHash, order: int, head: int, *, occurrences: bool = False
) -> Int64[np.ndarray, " slots"]:
    """n-grams per slot of one head; with `occurrences` each n-gram counts as often as the corpus holds it (reads)."""
    prime = ngram_hash.primes[ngram_hash.orders.index(order)][head]
    load = np.zeros(prime, dtype=np.int64)
    for part in counts.parts(order):
        np.add.at(load, part.mix % prime, part.count if occurrences else 1)
    return load


def expected_colliding(ngrams: int, slots: int | float) -> float:
    """Expected n-grams that share their slot with another one, under a uniform hash."""
    if ngrams < 2:
        return 0.0
    if slots == 1:
        return float(ngrams)
    return -ngrams * math.expm1((ngrams - 1) * math.log1p(-1 / slots))


@dataclass(frozen=True, eq=False)
class LoadHistogram:
    """`observed[k]` slots hold k n-grams, where a uniform hash would leave `expected[k]`."""

    observed: Int64[np.ndarray, " loads"]
    expected: Float[np.ndarray, " loads"]


def load_histogram(load: Int64[np.ndarray, " slots"]) -> LoadHistogram:
    """Slots by load, against the binomial expectation."""
    from scipy.stats import binom

    observed = np.bincount(load)
    expected = len(load) * binom.pmf(np.arange(len(observed)), int(load.sum()), 1 / len(load))
    return LoadHistogram(observed, expected)


@dataclass(frozen=True, eq=False)
class ZipfCurve:
    """Reads against rank (hottest row is rank 1), at about 200 ranks spaced evenly in the logarithm, and the fitted
    slope.
    """

    rank: Int64[np.ndarray, " points"]
    reads: Int64[np.ndarray, " points"]
    exponent: float


def zipf_curve(reads: Int64[np.ndarray, " slots"]) -> ZipfCurve:
    """The curve of a table's reads and the exponent s of reads ~ rank^-s (least squares in logarithms over those
    points).

    Raises: ValueError when nothing was read.
    """
    hottest = np.sort(reads[reads > 0])[::-1]
    if not len(hottest):
        raise ValueError("expected at least one read, found none")
    rank = np.unique(np.geomspace(1, len(hottest), 200).round().astype(np.int64))
    chosen = hottest[rank - 1]
    slope = float(np.polyfit(np.log(rank), np.log(chosen), 1)[0]) if len(rank) > 1 else 0.0
    return ZipfCurve(rank, chosen, -slope)


def rows_for_hit_rates(
    reads: Int64[np.ndarray, " slots"], rates: Sequence[float] = HIT_RATES
) -> Int64[np.ndarray, " rates"]:
    """How many of the hottest rows serve at least each share of all reads.

    Raises: ValueError for a rate outside (0, 1], or when nothing was read.
    """
    if bad := [rate for rate in rates if not 0 < rate <= 1]:
        raise ValueError(f"expected hit rates in (0, 1], found {bad[0]}")
    served = np.cumsum(np.sort(reads[reads > 0])[::-1])
    if not len(served):
        raise ValueError("expected at least one read, found none")
    targets = np.ceil(np.asarray(rates) * served[-1] - 1e-9).astype(np.int64)
    return np.searchsorted(served, targets) + 1
