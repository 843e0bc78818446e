"""Intervals: against closed forms, and by how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from engram_interp.measure.statistics import (
    function_of_means,
    jackknife,
    jackknife_covariance,
    mean_interval,
    not_estimable,
    paired_difference,
    proportion_interval,
    retained_fraction,
    simultaneous_band,
)


def clustered(
    rng: np.random.Generator, groups: int = 25, size: int = 8, columns: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    labels = np.repeat(np.arange(groups), size)
    return rng.normal(size=(groups, columns))[labels] + rng.normal(size=(groups * size, columns)), labels


def test_mean_interval_is_students_t_without_groups():
    values = np.random.default_rng(0).normal(3, 2, 40)
    found, expected = mean_interval(values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (found.n, found.rows, found.value) == (40, 40, pytest.approx(values.mean()))


def test_mean_interval_of_equal_groups_is_that_of_their_means():
    values, labels = clustered(np.random.default_rng(1))
    found, expected = mean_interval(values[:, 0], labels), mean_interval(values[:, 0].reshape(25, 8).mean(1))
    assert (found.value, found.se, found.n, found.rows) == pytest.approx((expected.value, expected.se, 25, 200))
    assert found.se > 1.5 * mean_interval(values[:, 0]).se
    order = np.random.default_rng(2).permutation(200)
    names = np.array([f"document {label}" for label in labels])
    assert mean_interval(values[order, 0], names[order]).se == pytest.approx(found.se)


def test_constant_values_have_no_spread():
    rng = np.random.default_rng(0)
    assert mean_interval(np.full(7, 0.1)).se == 0
    band = simultaneous_band(np.full((7, 2), 0.1), rng=rng)
    assert np.array_equal(band.low, band.high)
    same = paired_difference(np.arange(5.0), np.arange(5.0), rng=rng)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert not same.excludes(0)


def test_band_is_wider_than_each_interval_and_one_column_is_the_paired_difference():
    values, labels = clustered(np.random.default_rng(3), columns=8)
    band = simultaneous_band(values, labels, rng=np.random.default_rng(0))
    assert band.critical > stats.t.ppf(0.975, 24)
    assert (band.low < band.point_low).all()
    assert band.mean == pytest.approx(values.mean(0))
    assert (band.n, len(band.as_dict()["low"])) == (25, 8)
    a, b = values[:, 0], values[:, 1]
    paired = paired_difference(a, b, labels, rng=np.random.default_rng(5))
    alone = simultaneous_band((a - b)[:, None], labels, rng=np.random.default_rng(5))
    assert (paired.low, paired.high) == pytest.approx((alone.low[0], alone.high[0]))


def test_resampled_standard_errors_are_those_of_the_resample():
    from engram_interp.measure.statistics import _GroupTotals

    values, labels = clustered(np.random.default_rng(4), groups=6, size=3)
    values, labels = values[:-2], labels[:-2]  # unequal groups
    totals, rng = _GroupTotals.of(values, labels), np.random.default_rng(9)
    deviation, se = totals.resampled(rng, 1)
    weights = np.random.default_rng(9).multinomial(6, np.full(6, 1 / 6), size=1)[0]
    copies = [(g, c) for g, w in enumerate(weights) for c in range(w)]
    rows = np.concatenate([values[labels == g, 0] for g, _ in copies])
    names = np.concatenate([np.full((labels == g).sum(), 10 * g + c) for g, c in copies])
    expected = mean_interval(rows, names)
    assert deviation[0, 0] == pytest.approx(expected.value - values.mean())
    assert se[0, 0] == pytest.approx(expected.se)


@pytest.mark.parametrize(("successes", "n"), [(0, 15), (14, 30), (30, 30)])
def test_proportions_are_wilson_intervals(successes, n):
    values = np.arange(n) < successes
    expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
    found = proportion_interval(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_proportions_of_dependent_rows_are_wider():
    values, labels = clustered(np.random.default_rng(5))
    hits = values[:, 0] > 0
    alone, grouped = proportion_interval(hits), proportion_interval(hits, labels)
    assert grouped.high - grouped.low > 1.4 * (alone.high - alone.low)
    assert (grouped.n, grouped.rows) == (25, 200)
    assert proportion_interval(np.ones(200), labels).low == pytest.approx(proportion_interval(np.ones(25)).low)
    with pytest.raises(ValueError, match="array of 0 and 1"):
        proportion_interval(np.array([0.5]))


def test_retained_fraction_raw_and_chance_corrected():
    rng = np.random.default_rng(0)
    full, ablated = np.tile([1.0, 1, 1, 0], 100), np.tile([1.0, 1, 0, 0], 100)
    found = retained_fraction(full, ablated, rng=rng, chance=0.25)
    assert found.raw.value == pytest.approx(0.5 / 0.75)
    assert found.corrected.value == pytest.approx(0.25 / 0.5)
    assert found.difference.value == pytest.approx(-0.25)
    assert found.corrected.low < 0.5 < found.corrected.high
    assert found.raw.excludes(1)
    assert found.estimable
    assert retained_fraction(full, full, rng=rng).raw.value == 1


def test_retained_fraction_of_a_score_at_chance_is_not_estimable():
    rng, full, ablated = np.random.default_rng(0), np.zeros(500), np.zeros(500)
    full[:2], ablated[:5] = 1, 1
    found = retained_fraction(full, ablated, rng=rng)
    assert not found.estimable
    assert math.isnan(found.raw.value)
    assert "cannot be told from chance" in found.raw.reason
    assert str(found.corrected).startswith("not estimable")
    assert found.difference.value == pytest.approx(3 / 500)
    assert not found.raw.excludes(0)


def test_function_of_means_of_one_column_is_the_mean():
    values, labels = clustered(np.random.default_rng(6))
    found = function_of_means(values, lambda m: m[..., 0], labels, rng=np.random.default_rng(0))
    expected = mean_interval(values[:, 0], labels)
    assert found.value == pytest.approx(expected.value)
    assert found.se == pytest.approx(expected.se, rel=0.1)


def test_jackknife_of_a_mean_is_its_interval():
    values, other = np.random.default_rng(7).normal(size=(2, 30))
    without = (values.sum() - values) / 29
    found, expected = jackknife(float(values.mean()), without), mean_interval(values)
    assert (found.low, found.high, found.se) == pytest.approx((expected.low, expected.high, expected.se))
    covariance = jackknife_covariance(without, (other.sum() - other) / 29)
    assert covariance == pytest.approx(np.cov(values, other)[0, 1] / 30)
    assert jackknife(math.nan, without).reason
    assert not not_estimable("too few", 3).estimable


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rng: mean_interval(np.array([1.0, math.nan])), "found .*nan.* in row 1"),
        (
            lambda rng: mean_interval(np.ones(4), np.zeros(4)),
            r"at least 2 documents \(groups\) for an interval, found 1",
        ),
        (lambda rng: mean_interval(np.ones(1)), "at least 2 rows for an interval, found 1"),
        (lambda rng: jackknife(1.0, np.ones(1)), "at least 2 leave-one-out values, found 1"),
    ],
)
def test_clear_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.random.default_rng(0))


@pytest.mark.slow
def test_coverage_and_rejection():
    """Of 400 samples with 25 dependent groups: mean, band and difference hold the truth in 95 % +- 3 %."""
    rng, held = np.random.default_rng(8), np.zeros(3)
    for _ in range(400):
        values, labels = clustered(rng, columns=5)
        band = simultaneous_band(values, labels, rng=rng, resamples=400)
        mean = mean_interval(values[:, 0], labels)
        difference = paired_difference(values[:, 0], values[:, 1], labels, rng=rng, resamples=400)
        held += [mean.low <= 0 <= mean.high, not band.excludes().any(), difference.low <= 0 <= difference.high]
    assert held / 400 == pytest.approx(0.95, abs=0.03)


@pytest.mark.slow
def test_coverage_of_the_retained_fraction():
    """Of 200 samples of 60 items: the interval of ablated/full holds the truth at least 90 % of the time."""
    rng, held = np.random.default_rng(9), 0
    for _ in range(200):
        full = rng.random(60) < 0.8
        ablated = full & (rng.random(60) < 0.5)
        found = retained_fraction(full, ablated, rng=rng, resamples=300).raw
        held += found.low <= 0.5 <= found.high
    assert held / 200 >= 0.90
