"""How sure is a number that was averaged over tokens of a few documents?

Tokens of one document are not independent, so every function takes `groups` (one label per row, usually the document)
and draws or deletes whole groups. Formulas, with G groups, group sums S_g and sizes n_g, mean m = sum S_g / sum n_g:

- cluster-robust SE of a mean: SE^2 = G/(G-1) * sum_g (S_g - m n_g)^2 / (sum n_g)^2 (Liang & Zeger 1986), Student t with
  G-1;
- simultaneous band: bootstrap whole groups, t* = |m* - m| / SE*, take the quantile of its maximum over the columns
  (Romano & Wolf 2005); a paired difference is the band with one column;
- delete-one jackknife: SE^2 = (G-1)/G * sum_g (theta_(g) - mean theta_(.))^2 (Efron & Stein 1981);
- proportions: Wilson 1927, with the sample size divided by the design effect of the groups.

Cost: O(n) plus O(resamples * G * columns). Misleads when groups are few (below about 10 every interval here is rough),
and always in one respect: it describes other documents for the *same* checkpoint, never another training seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float, Shaped
from scipy import stats

LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A number with its interval. Unit: that of the values it was made from.

    `n` counts the independent units (documents, or rows when no groups were given), `rows` the values averaged. A
    number that cannot be estimated has `value` NaN and says why in `reason`.
    """

    value: float
    low: float
    high: float
    se: float
    n: int
    level: float = LEVEL
    rows: int = 0
    reason: str = ""

    @property
    def estimable(self) -> bool:
        """Whether there is a number at all."""
        return not self.reason

    def excludes(self, value: float | int) -> bool:
        """Whether the interval lies wholly on one side of `value`."""
        return self.estimable and not (self.low <= value <= self.high)

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.estimable:
            return f"not estimable ({self.reason})"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Band:
    """Means of several columns with an interval that covers all of them at once.

    `low`, `high`: simultaneous band. `point_low`, `point_high`: each column by itself. `critical`: how many standard
    errors the band spans to either side.
    """

    mean: Float[np.ndarray, " columns"]
    low: Float[np.ndarray, " columns"]
    high: Float[np.ndarray, " columns"]
    point_low: Float[np.ndarray, " columns"]
    point_high: Float[np.ndarray, " columns"]
    se: Float[np.ndarray, " columns"]
    critical: float
    n: int
    level: float = LEVEL

    def excludes(self, value: float | int = 0) -> Shaped[np.ndarray, " columns"]:
        """Which columns differ from `value`, with the error rate controlled over all columns together."""
        return (self.low > value) | (self.high < value)

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class RetainedFraction:
    """What is left of a score after an ablation.

    `raw` = ablated / full (the number papers print); `corrected` = (ablated - chance) / (full - chance); `difference` =
    ablated - full in units of the score, which always exists.
    """

    raw: Estimate
    corrected: Estimate
    difference: Estimate
    full: Estimate
    ablated: Estimate
    chance: float | int

    @property
    def estimable(self) -> bool:
        """False when the full score cannot be told from chance, so that no fraction of it means anything."""
        return self.corrected.estimable

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


class SharedDraws:
    """A generator that draws the resamples of a grouping once, for many estimates over the same rows.

    Differences between conditions are then compared on common resamples, and thousands of groups cost one draw.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._drawn: dict[tuple[int, int], Float[np.ndarray, "resamples groups"]] = {}

    def multinomial(
        self, n: int, pvals: Shaped[np.ndarray, " groups"], size: int
    ) -> Float[np.ndarray, "resamples groups"]:
        """As numpy's generator, in float64; equal arguments give the same array."""
        if (n, size) not in self._drawn:
            self._drawn[n, size] = self._rng.multinomial(n, pvals, size=size).astype(np.float64)
        return self._drawn[n, size]


Draws = np.random.Generator | SharedDraws


def not_estimable(reason: str, n: int, level: float = LEVEL) -> Estimate:
    """An Estimate without a number."""
    return Estimate(math.nan, math.nan, math.nan, math.nan, n, level, reason=reason)


def mean_interval(
    values: Shaped[np.ndarray, " n"], groups: Shaped[np.ndarray, " n"] | None = None, *, level: float = LEVEL
) -> Estimate:
    """Mean with a cluster-robust standard error and a Student t interval.

    Args: values: one number per row; groups: the document of each row, None when rows are independent.
    Raises: ValueError for non-finite values or fewer than 2 groups.
    """
    totals = _GroupTotals.of(values[:, None], groups)
    mean, se = totals.mean_and_se()
    half = stats.t.ppf((1 + level) / 2, totals.groups - 1) * se[0]
    m = float(mean[0])
    return Estimate(m, m - float(half), m + float(half), float(se[0]), totals.groups, level, len(values))


def group_mean_interval(
    means: Shaped[np.ndarray, " G"], sizes: Shaped[np.ndarray, " G"], *, level: float = LEVEL
) -> Estimate:
    """As `mean_interval`, from the mean and the number of rows of each group instead of the rows.

    Raises: ValueError for non-finite values or fewer than 2 groups.
    """
    if len(means) < 2 or not np.isfinite(means).all():
        raise ValueError(f"expected finite means of at least 2 groups, found {means}")
    centre = float(sizes @ means / sizes.sum())
    totals = _GroupTotals(np.array([centre]), ((means - centre) * sizes)[:, None], sizes.astype(np.float64))
    se = float(totals.mean_and_se()[1][0])
    half = float(stats.t.ppf((1 + level) / 2, totals.groups - 1)) * se
    return Estimate(centre, centre - half, centre + half, se, totals.groups, level, int(sizes.sum()))


def simultaneous_band(
    values: Shaped[np.ndarray, "n columns"],
    groups: Shaped[np.ndarray, " n"] | None = None,
    *,
    rng: Draws,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Band:
    """Column means with a max-t band: all columns are covered together with probability `level`.

    For a curve over layers pass one column per layer; for a paired comparison pass the differences. Never narrower than
    Student's t with G-1 degrees of freedom, since few groups leave the bootstrap few distinct resamples.
    Raises: ValueError for non-finite values or fewer than 2 groups.
    """
    totals = _GroupTotals.of(values, groups)
    mean, se = totals.mean_and_se()
    varies = se > 0
    critical = pointwise = stats.t.ppf((1 + level) / 2, totals.groups - 1)
    if varies.any():
        deviation, se_star = totals.resampled(rng, resamples)
        usable = (se_star[:, varies] > 0).all(1)  # a resample of one group repeated has no standard error
        t_star = np.abs(deviation[:, varies][usable] / se_star[:, varies][usable]).max(1)
        if len(t_star):
            critical = max(pointwise, float(np.quantile(t_star, level)))
    half, point = critical * se, pointwise * se
    return Band(mean, mean - half, mean + half, mean - point, mean + point, se, float(critical), totals.groups, level)


def paired_difference(
    a: Shaped[np.ndarray, " n"],
    b: Shaped[np.ndarray, " n"],
    groups: Shaped[np.ndarray, " n"] | None = None,
    *,
    rng: Draws,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Estimate:
    """Mean of a - b over the same rows, with a studentised bootstrap of whole groups.

    Raises: ValueError for unequal lengths, non-finite values or fewer than 2 groups.
    """
    if a.shape != b.shape:
        raise ValueError(f"expected the same rows in both arms, found {len(a)} and {len(b)}")
    difference = a.astype(np.float64) - b.astype(np.float64)
    band = simultaneous_band(difference[:, None], groups, rng=rng, resamples=resamples, level=level)
    return Estimate(
        float(band.mean[0]), float(band.low[0]), float(band.high[0]), float(band.se[0]), band.n, level, len(a)
    )


def proportion_interval(
    successes: Shaped[np.ndarray, " n"], groups: Shaped[np.ndarray, " n"] | None = None, *, level: float = LEVEL
) -> Estimate:
    """Share of successes with a Wilson interval, widened by the design effect when rows share a group.

    Args: successes: booleans, or 0 and 1. With no or only successes the groups count as the sample size.
    Raises: ValueError for values other than 0 and 1, or an empty array.
    """
    values = successes.astype(np.float64)
    if not len(values) or not np.isin(values, (0.0, 1.0)).all():
        raise ValueError(f"expected a non-empty array of 0 and 1, found {len(values)} values {np.unique(values)[:5]}")
    p, n = float(values.mean()), len(values)
    units = n if groups is None else len(np.unique(groups))
    effective, se = float(units), math.sqrt(p * (1 - p) / n)
    if groups is None or units == n:
        effective = float(n)
    elif 0 < p < 1 and units > 1:
        se = mean_interval(values, groups).se
        effective = min(float(n), p * (1 - p) / se**2) if se > 0 else float(units)
    low, high = _wilson(p, effective, level)
    return Estimate(p, low, high, se, units, level, n)


def retained_fraction(
    full: Shaped[np.ndarray, " n"],
    ablated: Shaped[np.ndarray, " n"],
    groups: Shaped[np.ndarray, " n"] | None = None,
    *,
    rng: Draws,
    chance: float | int = 0.0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> RetainedFraction:
    """Fraction of a score that survives, raw and chance-corrected, paired over the same items.

    Args: full, ablated: per-item scores (higher is better); chance: what guessing scores.
    Both fractions are "not estimable" when the interval of `full - chance` reaches 0: then the denominator is noise.
    Raises: ValueError for unequal lengths, non-finite values or fewer than 2 groups.
    """
    difference = paired_difference(ablated, full, groups, rng=rng, resamples=resamples, level=level)
    score, score_ablated = (mean_interval(v, groups, level=level) for v in (full, ablated))
    if score.low <= chance:
        reason = f"the full score {score} cannot be told from chance {chance:g}"
        raw = corrected = not_estimable(reason, score.n, level)
    else:
        columns = np.stack([full, ablated], 1)
        raw, corrected = (
            function_of_means(
                columns, lambda m, c=c: (m[..., 1] - c) / (m[..., 0] - c), groups,
                rng=rng, resamples=resamples, level=level,
            )
            for c in (0.0, chance)
        )  # fmt: skip
    return RetainedFraction(raw, corrected, difference, score, score_ablated, chance)


def function_of_means(
    columns: Shaped[np.ndarray, "n columns"],
    function: Callable[[np.ndarray], np.ndarray],
    groups: Shaped[np.ndarray, " n"] | None = None,
    *,
    rng: Draws,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Estimate:
    """A smooth function of column means (a ratio, a log) with a percentile bootstrap over groups.

    Args: function: maps means `[..., columns]` to `[...]`.
    Raises: ValueError for non-finite values or fewer than 2 groups.
    """
    totals = _GroupTotals.of(columns, groups)
    mean, _ = totals.mean_and_se()
    deviation, _ = totals.resampled(rng, resamples)
    draws = function(mean + deviation)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    value = float(function(mean))
    return Estimate(value, float(low), float(high), float(np.std(draws, ddof=1)), totals.groups, level, len(columns))


def jackknife(value: float, leave_one_out: Float[np.ndarray, " n"], *, level: float = LEVEL) -> Estimate:
    """Interval of an estimator from its values with one unit (row or document) left out at a time; Student t, n-1.

    Raises: ValueError for fewer than 2 values; NaN among them gives an Estimate that says so.
    """
    n = len(leave_one_out)
    if n < 2:
        raise ValueError(f"expected at least 2 leave-one-out values, found {n}")
    if not (math.isfinite(value) and np.isfinite(leave_one_out).all()):
        return not_estimable("the estimator is undefined on the sample or with one unit left out", n, level)
    se = math.sqrt(jackknife_covariance(leave_one_out, leave_one_out))
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * se
    return Estimate(value, value - half, value + half, se, n, level, n)


def jackknife_covariance(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Covariance of two estimators from leave-one-out values over the same units."""
    n = len(a)
    return float((n - 1) / n * ((a - a.mean()) * (b - b.mean())).sum())


@dataclass(frozen=True)
class _GroupTotals:
    """Per-group sums of values centred by the overall mean, and sizes: all that means, errors and resamples need."""

    centre: np.ndarray  # [columns]
    sums: np.ndarray  # [G, columns], of value - centre
    sizes: np.ndarray  # [G]

    @classmethod
    def of(cls, values: np.ndarray, groups: np.ndarray | None) -> _GroupTotals:
        values = values.astype(np.float64)
        if not np.isfinite(values).all():
            row = int(np.argwhere(~np.isfinite(values))[0, 0])
            raise ValueError(f"expected finite values, found {values[row]} in row {row}")
        if groups is not None and len(groups) != len(values):
            raise ValueError(f"expected one group per row, found {len(groups)} groups for {len(values)} rows")
        _, index = np.unique(np.arange(len(values)) if groups is None else groups, return_inverse=True)
        count = int(index.max()) + 1 if len(index) else 0
        if count < 2:
            kind = "rows" if groups is None else "documents (groups)"
            raise ValueError(f"expected at least 2 {kind} for an interval, found {count}")
        centre = values.mean(0)
        sums = np.zeros((count, values.shape[1]))
        np.add.at(sums, index, values - centre)
        return cls(centre, sums, np.bincount(index, minlength=count).astype(np.float64))

    @property
    def groups(self) -> int:
        return len(self.sizes)

    def mean_and_se(self) -> tuple[np.ndarray, np.ndarray]:
        g = self.groups
        se = np.sqrt(g / (g - 1) * (self.sums**2).sum(0)) / self.sizes.sum()
        # Rounding leaves a constant column with a deviation of a few ulp; that is no spread.
        return self.centre, np.where(se < 1e-14 * np.maximum(1e-300, np.abs(self.centre)), 0.0, se)

    def resampled(self, rng: Draws, resamples: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean minus the sample's mean, and its standard error, in each resample: both [resamples, columns]."""
        g = self.groups
        weights = rng.multinomial(g, np.full(g, 1 / g), size=resamples).astype(np.float64, copy=False)
        rows = (weights @ self.sizes)[:, None]
        shift = weights @ self.sums / rows
        squares = (
            weights @ self.sums**2
            - 2 * shift * (weights @ (self.sums * self.sizes[:, None]))
            + shift**2 * (weights @ self.sizes**2)[:, None]
        )
        # Cancellation leaves about 1e-16 of the first term where the truth is 0 (one group repeated).
        floor = 1e-12 * (weights @ self.sums**2)
        return shift, np.sqrt(g / (g - 1) * np.where(squares > floor, squares, 0.0)) / rows


def _wilson(p: float, n: float, level: float) -> tuple[float, float]:
    z = float(stats.norm.ppf((1 + level) / 2))
    centre, scale = p + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
