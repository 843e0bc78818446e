"""CKA of more rows than fit in memory, exactly.

Song's unbiased HSIC is a function of sums over rows (q_i = |x_i|^2, p_i = |y_i|^2, C = X'Y, m = column sums):

    <K, L> = |C|_F^2 - sum q p;   1'K1 = |m_x|^2 - sum q;
    (K1)'(L1) = m_x' C m_y - m_y' sum(q y) - m_x' sum(p x) + sum q p

so any batching, and any split over processes (`merge`), gives the full-sample value; averaging per-batch values, as
minibatch CKA does, is a different and noisier estimator. Rows are shifted by the first batch's mean before accumulation
in float64: the value does not depend on it, the rounding does. Cost: O(n d_x d_y) time, O(d_x d_y) memory. It keeps no
rows, so it has no interval and cannot exclude pairs of rows from one document: use `linear_cka` for those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engram_interp.measure.cka_diagnostics import feature_share
from engram_interp.shapes import Float, Tensor


@dataclass(frozen=True)
class StreamedCKA:
    """The unbiased and the biased value over all rows seen, and what the covariances say about each side."""

    value: float
    biased: float
    hsic_xy: float
    hsic_xx: float
    hsic_yy: float
    n: int
    participation_ratio: tuple[float, float]
    top_feature_share: tuple[float, float]
    reason: str = ""


class CKAAccumulator:
    """Exact unbiased CKA over a stream of batches.

    >>> x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    >>> cka = CKAAccumulator(8, 8)
    >>> for start in range(0, 300, 100):
    ...     _ = cka.update(x[start : start + 100], -2 * x[start : start + 100])
    >>> round(cka.result().value, 4)  # sign and scale do not matter
    1.0
    """

    def __init__(self, dx: int, dy: int) -> None:
        self.dx, self.dy = dx, dy
        self._shift: tuple[Tensor, Tensor] | None = None
        self._xy, self._xx, self._yy = PairSums.empty(dx, dy), PairSums.empty(dx, dx), PairSums.empty(dy, dy)

    @property
    def n(self) -> int:
        """Rows seen."""
        return self._xy.n

    def update(self, x: Float[Tensor, "n dx"], y: Float[Tensor, "n dy"]) -> CKAAccumulator:
        """Add a batch of rows of any float dtype; an empty batch changes nothing.

        Raises: ValueError for unequal lengths, other widths, or a non-finite value (with its row in the stream).
        """
        if x.shape != (len(y), self.dx) or y.shape[1] != self.dy:
            raise ValueError(
                f"expected as many rows of width {self.dx} as of {self.dy}, found {list(x.shape)} and {list(y.shape)}"
            )
        for name, rows in (("x", x), ("y", y)):
            bad = ~rows.isfinite().all(1)
            if bad.any():
                raise ValueError(
                    f"expected finite activations, found {name} not finite in row {self.n + int(bad.nonzero()[0])}"
                )
        if len(x):
            x, y = x.detach().double(), y.detach().double()
            if self._shift is None:
                self._shift = x.mean(0), y.mean(0)
            x, y = x - self._shift[0], y - self._shift[1]
            self._xy, self._xx, self._yy = self._xy.plus(x, y), self._xx.plus(x, x), self._yy.plus(y, y)
        return self

    def merge(self, other: CKAAccumulator) -> CKAAccumulator:
        """Add the rows another accumulator saw (another process, another file); `other` is unchanged.

        Raises: ValueError for other widths.
        """
        if (other.dx, other.dy) != (self.dx, self.dy):
            raise ValueError(f"expected widths {self.dx} and {self.dy}, found {other.dx} and {other.dy}")
        if other._shift is None:
            return self
        if self._shift is None:
            self._shift, (self._xy, self._xx, self._yy) = other._shift, (other._xy, other._xx, other._yy)
            return self
        x, y = self._shift[0] - other._shift[0], self._shift[1] - other._shift[1]
        self._xy = self._xy + other._xy.shifted(x, y)
        self._xx = self._xx + other._xx.shifted(x, x)
        self._yy = self._yy + other._yy.shifted(y, y)
        return self

    def result(self) -> StreamedCKA:
        """CKA of everything seen so far; NaN with a reason when HSIC_u of a side with itself is not positive.

        Raises: ValueError for fewer than 4 rows.
        """
        if self.n < 4:
            raise ValueError(f"expected at least 4 rows, found {self.n}")
        x, y = self._xy.sum_x / self.n, self._xy.sum_y / self.n
        xy, xx, yy = self._xy.shifted(x, y), self._xx.shifted(x, x), self._yy.shifted(y, y)  # centred
        hxy, hxx, hyy = xy.hsic(), xx.hsic(), yy.hsic()
        biased = float(xy.c.square().sum() / (xx.c.norm() * yy.c.norm()))
        defined = hxx > 0 and hyy > 0
        reason = "" if defined else "HSIC of a side with itself is not positive: zero variance, or noise at this n"
        value = hxy / math.sqrt(hxx * hyy) if defined else math.nan
        ratios = tuple(float(c.trace() ** 2 / c.square().sum()) for c in (xx.c, yy.c))
        shares = tuple(feature_share(c[top := int(c.diagonal().argmax())], top, c.square().sum()) for c in (xx.c, yy.c))
        return StreamedCKA(value, biased, hxy, hxx, hyy, self.n, ratios, shares, reason)  # type: ignore[arg-type]


@dataclass(frozen=True)
class PairSums:
    """The sums of one pair (x, y); `qp` is sum q_i p_i, `q_y` is sum q_i y_i, `p_x` is sum p_i x_i."""

    n: int
    c: Tensor
    sum_x: Tensor
    sum_y: Tensor
    q: Tensor
    p: Tensor
    qp: Tensor
    q_y: Tensor
    p_x: Tensor

    @classmethod
    def empty(cls, dx: int, dy: int) -> PairSums:
        """Over no rows."""
        none = torch.zeros((), dtype=torch.float64)
        x, y = none.new_zeros(dx), none.new_zeros(dy)
        return cls(0, none.new_zeros(dx, dy), x, y, none, none, none, y, x)

    def plus(self, x: Tensor, y: Tensor) -> PairSums:
        """With the rows x, y added."""
        q, p = x.square().sum(1), y.square().sum(1)
        return self + PairSums(len(x), x.T @ y, x.sum(0), y.sum(0), q.sum(), p.sum(), q @ p, q @ y, p @ x)

    def __add__(self, other: PairSums) -> PairSums:
        return PairSums(**{name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__})

    def shifted(self, dx: Tensor, dy: Tensor) -> PairSums:
        """The same sums of the rows x - dx, y - dy."""
        n, c, m, k = self.n, self.c, self.sum_x, self.sum_y
        a, b = dx @ dx, dy @ dy
        q, p = self.q - 2 * dx @ m + n * a, self.p - 2 * dy @ k + n * b
        cross = c - torch.outer(dx, k) - torch.outer(m, dy) + n * torch.outer(dx, dy)
        qp = (
            self.qp - 2 * self.q_y @ dy - 2 * self.p_x @ dx + 4 * dx @ c @ dy
            + b * self.q + a * self.p - 2 * b * (dx @ m) - 2 * a * (dy @ k) + n * a * b
        )  # fmt: skip
        q_y = self.q_y - 2 * dx @ c + a * k - dy * q
        p_x = self.p_x - 2 * c @ dy + b * m - dx * p
        return PairSums(n, cross, m - n * dx, k - n * dy, q, p, qp, q_y, p_x)

    def hsic(self) -> float:
        """Song's unbiased HSIC; the rows should be centred, for the rounding."""
        n, m, k = self.n, self.sum_x, self.sum_y
        product = self.c.square().sum() - self.qp
        rows = m @ self.c @ k - k @ self.q_y - m @ self.p_x + self.qp
        whole = (m @ m - self.q) * (k @ k - self.p) / ((n - 1) * (n - 2))
        return float((product + whole - 2 * rows / (n - 2)) / (n * (n - 3)))
