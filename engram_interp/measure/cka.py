"""How similar are two representations of the same tokens, up to rotation and scale?

Linear centred kernel alignment, `HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y))` (Kornblith et al. 2019), from the *unbiased*
HSIC (`hsic`, or `hsic_documents` when documents have several rows), in float64 over the full sample and all features,
not clamped. The interval is a delete-one(-document) jackknife: the naive bootstrap of unbiased CKA puts duplicated rows
off the diagonal and covered 0.000 to 0.85 where 0.95 was promised. The permutation null shuffles documents; it rejects
only "unrelated": for "more alike than two seeds" compare with a heat map of two seeds.

Cost: see `hsic`. Misleads under massive activations (see `cka_diagnostics`; the companions and warnings here), when
positions or one seed are shared by both models, and when features were subsampled (never do).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from scipy import stats

from engram_interp.measure.cka_diagnostics import (
    Spread,
    biased_cka,
    disagreements,
    rms_rows,
    spread,
    without_top_feature,
)
from engram_interp.measure.hsic import HSICCells, hsic_rows, permuted_cka
from engram_interp.measure.hsic_documents import hsic_documents
from engram_interp.measure.statistics import LEVEL, Estimate, jackknife, jackknife_covariance
from engram_interp.shapes import Float, Int64, Tensor

Rows = Float[Tensor, "_ _"] | Float[np.ndarray, "_ _"]  # [rows, features]; equal lengths are checked by value
_GRAM_BYTES = 512 * 2**20
Groups = Sequence | np.ndarray | Tensor | None


@dataclass(frozen=True)
class CKAMatrix:
    """CKA of every layer of model a (rows) with every layer of model b (columns).

    `low`, `high`: per-cell jackknife interval over documents. `leave_one_out`: the heat map without each document, from
    which the error of any function of cells follows. `null_max`: 95 % quantile of the largest |CKA| in the heat map
    under permutation of documents (family-wise), NaN when no permutations were asked for. `companions`: the heat map by
    other estimators.
    """

    values: Float[np.ndarray, "a b"]
    low: Float[np.ndarray, "a b"]
    high: Float[np.ndarray, "a b"]
    se: Float[np.ndarray, "a b"]
    leave_one_out: Float[np.ndarray, "a b u"]
    hsic: HSICCells = field(repr=False)
    n: int
    documents: int
    level: float
    null_max: float
    companions: dict[str, np.ndarray]
    spread_a: tuple[Spread, ...]
    spread_b: tuple[Spread, ...]
    warnings: tuple[str, ...]

    def difference(self, cell: tuple[int, int], other: tuple[int, int]) -> Estimate:
        """CKA of one cell minus another, with their covariance: is layer 12 really a better match than layer 5?"""
        without = self.leave_one_out[cell] - self.leave_one_out[other]
        return jackknife(float(self.values[cell] - self.values[other]), without, level=self.level)

    def covariance(self, cell: tuple[int, int], other: tuple[int, int]) -> float:
        """Jackknife covariance of two cells."""
        return jackknife_covariance(self.leave_one_out[cell], self.leave_one_out[other])


@dataclass(frozen=True)
class CKAResult:
    """CKA of two representations, with its interval, its companions and what may be wrong with it.

    `value` is NaN, with the reason in `estimate.reason`, when HSIC_u of a side with itself is not positive. `null_95`,
    `p_value`: from permuted documents, two-sided; NaN without permutations.
    """

    estimate: Estimate
    n: int
    documents: int
    dx: int
    dy: int
    hsic_xy: float
    hsic_xx: float
    hsic_yy: float
    biased: float
    rms: float
    drop_top: float
    spread_x: Spread
    spread_y: Spread
    leave_one_out: Float[np.ndarray, " u"] = field(repr=False)
    null_95: float
    p_value: float
    warnings: tuple[str, ...]

    @property
    def value(self) -> float:
        """Unbiased CKA; at most about 1, and it can be negative."""
        return self.estimate.value

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.estimate.low

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.estimate.high


def linear_cka(
    x: Rows,
    y: Rows,
    *,
    groups: Groups = None,
    permutations: int = 0,
    rng: np.random.Generator | None = None,
    companions: bool = True,
    level: float = LEVEL,
) -> CKAResult:
    """Unbiased linear CKA of the same n rows in two representations.

    Args:
        x, y: activations, `[n, d_x]` and `[n, d_y]`, any float dtype; widths may differ.
        groups: the document of each row. When a document repeats, pairs of rows from one document are excluded and the
        jackknife
            leaves out documents.
        permutations, rng: size and randomness of the permutation null.
        companions: also compute the biased value, the value on rms-normalised rows and without the largest feature.
    Raises: ValueError for fewer than 4 rows or documents, unequal lengths, a constant side, or a non-finite value.

    >>> import numpy as np
    >>> from engram_interp.probes import linear_cka
    >>> x = np.random.default_rng(0).normal(size=(40, 8))
    >>> turn = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0]
    >>> round(linear_cka(x, 3 * x @ turn).value, 9)  # rotation and scale do not matter
    1.0
    """
    matrix = cka_matrix(
        [x], [y], groups=groups, permutations=0, companions=companions, level=level, names_a=("x",), names_b=("y",)
    )  # fmt: skip
    value, without, h = float(matrix.values[0, 0]), matrix.leave_one_out[0, 0], matrix.hsic
    null = np.full(0, math.nan)
    if permutations:
        null = permutation_null([x], [y], groups=groups, permutations=permutations, rng=rng)
    extra = {name: float(m[0, 0]) for name, m in matrix.companions.items()}
    return CKAResult(
        estimate=jackknife(value, without, level=level),
        n=matrix.n, documents=matrix.documents, dx=x.shape[1], dy=y.shape[1],
        hsic_xy=float(h.ab[0, 0]), hsic_xx=float(h.aa[0]), hsic_yy=float(h.bb[0]),
        biased=extra.get("biased", math.nan), rms=extra.get("rms", math.nan), drop_top=extra.get("drop_top", math.nan),
        spread_x=matrix.spread_a[0], spread_y=matrix.spread_b[0], leave_one_out=without,
        null_95=float(np.quantile(null, level)) if permutations else math.nan,
        p_value=float((1 + (null >= abs(value)).sum()) / (1 + len(null))) if permutations else math.nan,
        warnings=matrix.warnings,
    )  # fmt: skip


def cka_matrix(
    layers_a: Sequence[Rows],
    layers_b: Sequence[Rows],
    *,
    groups: Groups = None,
    permutations: int = 0,
    rng: np.random.Generator | None = None,
    companions: bool = True,
    level: float = LEVEL,
    names_a: Sequence[str] | None = None,
    names_b: Sequence[str] | None = None,
) -> CKAMatrix:
    """The whole heat map in one pass over the rows; arguments and errors as `linear_cka`, `names` for the messages.

    Up to 4096 rows one product of U-centred Gram rows gives every cell and every leave-one-out value; above, no Gram is
    formed.
    """
    names_a = names_a or [f"layer {i} of a" for i in range(len(layers_a))]
    names_b = names_b or [f"layer {i} of b" for i in range(len(layers_b))]
    a, b = _checked(layers_a, names_a), _checked(layers_b, names_b)
    documents = _documents(groups, len(a[0]), len(b[0]))
    centred_a, centred_b = ([x - x.mean(0) for x in side] for side in (a, b))
    cells = _hsic(centred_a, centred_b, documents)
    values, without = cells.cka().numpy(), cells.loo_cka().numpy()
    low, high, se = _jackknife_cells(values, without, level)
    extra = _companions(a, b, centred_a, centred_b, documents) if companions else {}
    spread_a, spread_b = (tuple(spread(x) for x in side) for side in (centred_a, centred_b))
    null = math.nan
    if permutations:
        null = float(np.quantile(_null(centred_a, centred_b, documents, permutations, rng), level))
    notes = [w for s, name in zip(spread_a + spread_b, (*names_a, *names_b), strict=True) for w in s.warnings(name)]
    notes += _cell_warnings(values, extra, names_a, names_b)
    return CKAMatrix(
        values, low, high, se, without, cells, len(a[0]), without.shape[-1], level, null, extra, spread_a, spread_b,
        tuple(notes),
    )  # fmt: skip


def permutation_null(
    layers_a: Sequence[Rows],
    layers_b: Sequence[Rows],
    *,
    groups: Groups = None,
    permutations: int,
    rng: np.random.Generator | None,
) -> Float[np.ndarray, " permutations"]:
    """Largest |CKA| of the heat map in each of `permutations` random pairings of documents.

    Documents of unequal length are cut to the shorter of the two paired ones, which makes the null slightly wider,
    never narrower.
    """
    a = _checked(layers_a, [f"layer {i} of a" for i in range(len(layers_a))])
    b = _checked(layers_b, [f"layer {i} of b" for i in range(len(layers_b))])
    documents = _documents(groups, len(a[0]), len(b[0]))
    return _null([x - x.mean(0) for x in a], [y - y.mean(0) for y in b], documents, permutations, rng)


def _checked(layers: Sequence[Rows], names: Sequence[str]) -> list[Tensor]:
    """Layers as float64; every one has the same rows, finite values and some variance."""
    if not layers:
        raise ValueError("expected at least one layer per side, found none")
    checked = []
    for rows, name in zip(layers, names, strict=True):
        x = torch.as_tensor(rows).detach().to("cpu", torch.float64)
        if len(x) != len(layers[0]):
            raise ValueError(f"expected {len(layers[0])} rows in {name}, as in {names[0]}, found {len(x)}")
        if len(x) < 4:
            raise ValueError(f"expected at least 4 rows, found {len(x)} in {name}")
        finite = x.isfinite()
        if not finite.all():
            row, feature = (~finite).nonzero()[0].tolist()
            raise ValueError(
                f"expected finite activations, found {x[row, feature]} in {name}, row {row}, feature {feature}"
            )
        if float((x - x.mean(0)).abs().max()) <= 1e-12 * float(x.abs().max()):
            raise ValueError(
                f"expected activations that vary, found zero variance in {name}: all {len(x)} rows are equal"
            )
        checked.append(x)
    return checked


def _documents(groups: Groups, n_a: int, n_b: int) -> Int64[Tensor, " n"] | None:
    """Document index per row, or None when every row is its own document."""
    if n_a != n_b:
        raise ValueError(f"expected the same rows on both sides, found {n_a} and {n_b}")
    if groups is None:
        return None
    if len(groups) != n_a:
        raise ValueError(f"expected one group per row, found {len(groups)} groups for {n_a} rows")
    unique, index = np.unique(np.asarray(groups), return_inverse=True)
    if len(unique) < 4:
        raise ValueError(f"expected rows from at least 4 documents, found {len(unique)}")
    return None if len(unique) == n_a else torch.as_tensor(index.reshape(-1), dtype=torch.int64)


def _hsic(a: list[Tensor], b: list[Tensor], documents: Tensor | None) -> HSICCells:
    cells = hsic_rows(a, b) if documents is None else hsic_documents(a, b, documents)
    return replace(cells, aa=_rounded_off(cells.aa, a), bb=_rounded_off(cells.bb, b))


def _rounded_off(own: Tensor, layers: list[Tensor]) -> Tensor:
    """Self terms that are rounding error of the squared norms become 0: only one row of such a layer differs."""
    scale = torch.stack([x.square().sum(1).mean() for x in layers]).square()
    return torch.where(own < 1e-24 * scale, torch.zeros_like(own), own)


def _jackknife_cells(
    values: np.ndarray, without: np.ndarray, level: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u = without.shape[-1]
    se = np.sqrt((u - 1) / u * ((without - without.mean(-1, keepdims=True)) ** 2).sum(-1))
    half = stats.t.ppf((1 + level) / 2, u - 1) * se
    return values - half, values + half, se


def _companions(
    a: list[Tensor], b: list[Tensor], centred_a: list[Tensor], centred_b: list[Tensor], documents: Tensor | None
) -> dict[str, np.ndarray]:
    """The heat map by the biased estimator, on rms-normalised rows, and without each layer's largest feature."""
    found = {
        "biased": biased_cka(centred_a, centred_b),
        "rms": _hsic([rms_rows(x) for x in a], [rms_rows(y) for y in b], documents).cka(),
    }
    if all(x.shape[1] > 1 for x in a + b):
        dropped_a, dropped_b = ([without_top_feature(x) for x in side] for side in (centred_a, centred_b))
        found["drop_top"] = _hsic(dropped_a, dropped_b, documents).cka()
    return {name: matrix.numpy() for name, matrix in found.items()}


def _cell_warnings(
    values: np.ndarray, extra: dict[str, np.ndarray], names_a: Sequence[str], names_b: Sequence[str]
) -> list[str]:
    """One warning per undefined cell; of the companions, the worst cell of each."""
    notes = [
        f"{names_a[i]}, {names_b[j]}: undefined, HSIC of a side with itself is not positive (n too small for the noise)"
        for i, j in np.argwhere(np.isnan(values))
    ]
    for name, matrix in extra.items():
        gap = np.nan_to_num(np.abs(matrix - values), nan=0.0)
        i, j = map(int, np.unravel_index(int(gap.argmax()), gap.shape))
        count = int((gap > 0.1).sum())
        where = f"{names_a[i]}, {names_b[j]}" + (f" and {count - 1} more cells" if count > 1 else "")
        notes += [f"{where}: {w}" for w in disagreements(float(values[i, j]), {name: float(matrix[i, j])})]
    return notes


def _null(
    a: list[Tensor], b: list[Tensor], documents: Tensor | None, permutations: int, rng: np.random.Generator | None
) -> np.ndarray:
    if rng is None:
        raise ValueError("expected a numpy Generator (rng=...) to permute documents with, found None")
    members = None if documents is None else [(documents == g).nonzero()[:, 0] for g in range(int(documents.max()) + 1)]
    units = len(a[0]) if members is None else len(members)
    orders = np.stack([rng.permutation(units) for _ in range(permutations)])
    if members is not None:
        heatmaps = (_paired_documents(a, b, members, order).cka() for order in orders)
    elif 8 * units**2 * (len(a) + len(b)) <= _GRAM_BYTES:
        heatmaps = permuted_cka(a, b, torch.as_tensor(orders))
    else:
        heatmaps = (hsic_rows(a, [y[torch.as_tensor(order)] for y in b]).cka() for order in orders)
    return np.array([np.nanmax(h.abs().numpy(), initial=0.0) for h in heatmaps])


def _paired_documents(a: list[Tensor], b: list[Tensor], members: list[Tensor], order: np.ndarray) -> HSICCells:
    """Document g of a beside document order[g] of b, both cut to the shorter."""
    lengths = [min(len(own), len(members[j])) for own, j in zip(members, order, strict=True)]
    rows_a = torch.cat([own[:k] for own, k in zip(members, lengths, strict=True)])
    rows_b = torch.cat([members[j][:k] for j, k in zip(order, lengths, strict=True)])
    documents = torch.repeat_interleave(torch.arange(len(members)), torch.tensor(lengths))
    return hsic_documents([x[rows_a] for x in a], [y[rows_b] for y in b], documents)
