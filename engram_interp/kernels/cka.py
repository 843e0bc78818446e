"""CKA of every layer pair of two models over any number of rows, as one matrix product per chunk of rows.

Song's unbiased HSIC is a function of sums over rows (q_i = |x_i|^2, p_i = |y_i|^2, C = X'Y, m = column sums):

    <K, L> = |C|_F^2 - sum q p;   1'K1 = |m_x|^2 - sum q;
    (K1)'(L1) = m_x' C m_y - m_y' sum(q y) - m_x' sum(p x) + sum q p

so any batching gives the full-sample value; averaging per-batch values, as minibatch CKA does, is a different and noisier
estimator. All layers of a side stand beside each other, X [n, sum of widths]: C of all pairs is one product, and so are
the sums of rows weighted by squared norms. A chunk's product is float32 (float64 for float64 rows), its sum float64; both
sides are shifted by the first chunk's mean, which changes no value and makes the rounding twenty times smaller.

Cost: 2 n (sum dx) (sum dy) operations for the pairs and 2 n sum(dx^2) + 2 n sum(dy^2) for each layer with itself. Memory:
8 (sum dx)(sum dy) bytes whatever n is. Exact over any chunking and any split over processes (`merge`). Keeps no rows, so
no interval and no exclusion of pairs of rows from one document: `engram_interp.measure.cka.cka_matrix` has those, and is
the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float64

from engram_interp.shapes import Tensor


@dataclass(frozen=True, eq=False)
class CKAGridResult:
    """Unbiased CKA of every layer of a (rows) with every layer of b, NaN where a self term is not positive; `biased`."""

    values: Float64[Tensor, "a b"]
    biased: Float64[Tensor, "a b"]
    n: int


class CKAGrid:
    """Sums over the rows seen so far.

    >>> layers = [torch.randn(300, width, generator=torch.Generator().manual_seed(width)) for width in (8, 16)]
    >>> grid = CKAGrid([8, 16], [8, 16])
    >>> for start in range(0, 300, 100):
    ...     _ = grid.update(*[[x[start : start + 100] for x in layers]] * 2)
    >>> grid.result().values.diagonal().round(decimals=4)
    tensor([1., 1.], dtype=torch.float64)
    """

    def __init__(self, widths_a: Sequence[int], widths_b: Sequence[int]) -> None:
        self.widths = (tuple(widths_a), tuple(widths_b))
        self._shift: tuple[Tensor, Tensor] | None = None
        self._sums = _GridSums.empty(*self.widths)

    @property
    def n(self) -> int:
        """Rows seen."""
        return self._sums.n

    @torch.no_grad()
    def update(self, layers_a: Sequence[Tensor], layers_b: Sequence[Tensor]) -> CKAGrid:
        """Add a chunk: one tensor [n, width] per layer, a few thousand rows for full speed.

        Raises: ValueError for other widths, unequal lengths, or values that are not finite (with side and layer).
        """
        a, b = (self._side(layers, side) for side, layers in enumerate((layers_a, layers_b)))
        if len(a) != len(b):
            raise ValueError(f"expected as many rows on both sides, found {len(a)} and {len(b)}")
        if len(a):
            if self._shift is None:
                self._shift = a.mean(0), b.mean(0)
            self._sums.add(a.sub_(self._shift[0]), b.sub_(self._shift[1]), *self.widths)
        return self

    def _side(self, layers: Sequence[Tensor], side: int) -> Tensor:
        found = tuple(x.shape[1] for x in layers)
        if found != self.widths[side]:
            raise ValueError(f"expected layers of widths {self.widths[side]} on side {'ab'[side]}, found {found}")
        joined = torch.cat([x if x.dtype == torch.float64 else x.float() for x in layers], 1)
        if not bool(joined.sum().isfinite()):  # one pass; which layer is looked for only then
            for i, x in enumerate(layers):
                if not bool(x.isfinite().all()):
                    raise ValueError(f"expected finite activations, found others in layer {i} of side {'ab'[side]}")
        return joined

    def merge(self, other: CKAGrid) -> CKAGrid:
        """Add the rows that another grid saw (another process, another file); `other` is unchanged.

        Raises: ValueError for other widths.
        """
        if other.widths != self.widths:
            raise ValueError(f"expected widths {self.widths}, found {other.widths}")
        if other._shift is None:
            return self
        if self._shift is None:
            self._shift = other._shift
            self._sums.plus(other._sums)
            return self
        move_a, move_b = (
            mine.double() - theirs.double() for mine, theirs in zip(self._shift, other._shift, strict=True)
        )
        self._sums.plus(other._sums.shifted(move_a, move_b, *self.widths))
        return self

    def state(self) -> dict[str, Tensor]:
        """Everything as tensors, for a shard on disk or another process."""
        shift = self._shift or tuple(torch.zeros(sum(w)) for w in self.widths)
        return {"n": torch.tensor(self.n), "shift_a": shift[0], "shift_b": shift[1], **self._sums.tensors()}

    @classmethod
    def from_state(cls, widths_a: Sequence[int], widths_b: Sequence[int], state: dict[str, Tensor]) -> CKAGrid:
        """The grid that `state` came from."""
        grid = cls(widths_a, widths_b)
        if n := int(state["n"]):
            grid._shift = state["shift_a"], state["shift_b"]
            grid._sums.plus(_GridSums(n, **{name: state[name] for name in grid._sums.tensors()}))
        return grid

    def result(self) -> CKAGridResult:
        """CKA of everything seen so far.

        Raises: ValueError for fewer than 4 rows.
        """
        if self.n < 4:
            raise ValueError(f"expected at least 4 rows, found {self.n}")
        a, b = (range(len(w)) for w in self.widths)
        pairs = [[_centred(self._sums.pair(i, j, *self.widths)) for j in b] for i in a]
        own = [
            [_centred(self._sums.own(side, i, self.widths[side])) for i in layers] for side, layers in enumerate((a, b))
        ]
        h_a, h_b = (torch.tensor([p.hsic() for p in side], dtype=torch.float64) for side in own)
        h = torch.tensor([[p.hsic() for p in row] for row in pairs], dtype=torch.float64)
        defined = (h_a[:, None] > 0) & (h_b[None] > 0)
        values = torch.where(defined, h / (h_a[:, None] * h_b[None]).abs().sqrt(), math.nan)
        n_a, n_b = (torch.stack([p.c.norm() for p in side]) for side in own)
        biased = torch.stack([torch.stack([p.c.square().sum() for p in row]) for row in pairs]) / (n_a[:, None] * n_b)
        return CKAGridResult(values, biased, self.n)


def _centred(sums: _PairSums) -> _PairSums:
    return sums.shifted(sums.sum_x / sums.n, sums.sum_y / sums.n)


@dataclass
class _GridSums:
    """For joined sides x [n, Dx], y [n, Dy] and squared norms q [n, a], p [n, b] per layer, over rows, float64.

    `c` x'y; `aa`, `bb` the diagonal blocks of x'x and y'y, flat one after another; `x_q` x'q: [Dx, a], `x_p` x'p: [Dx, b],
    `y_q`, `y_p` alike; `qp` q'p, `qq`, `pp`; sums of x, y, q, p.
    """

    n: int
    c: Tensor
    aa: Tensor
    bb: Tensor
    x_q: Tensor
    x_p: Tensor
    y_q: Tensor
    y_p: Tensor
    qp: Tensor
    qq: Tensor
    pp: Tensor
    x: Tensor
    y: Tensor
    q: Tensor
    p: Tensor

    @classmethod
    def empty(cls, wa: tuple[int, ...], wb: tuple[int, ...]) -> _GridSums:
        dx, dy, a, b = sum(wa), sum(wb), len(wa), len(wb)
        shapes = (
            (dx, dy), (sum(w * w for w in wa),), (sum(w * w for w in wb),), (dx, a), (dx, b), (dy, a), (dy, b),
            (a, b), (a, a), (b, b), (dx,), (dy,), (a,), (b,),
        )  # fmt: skip
        return cls(0, *(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)[1:]}

    def plus(self, other: _GridSums) -> None:
        self.n += other.n
        for name, value in self.tensors().items():
            value.add_(getattr(other, name))

    def add(self, x: Tensor, y: Tensor, wa: tuple[int, ...], wb: tuple[int, ...]) -> None:
        """Add a shifted chunk."""
        layers_x, layers_y = x.split(wa, 1), y.split(wb, 1)
        q, p = (torch.stack([torch.linalg.vecdot(z, z) for z in side], 1) for side in (layers_x, layers_y))
        self.n += len(x)
        self.c += x.T @ y
        self.aa += torch.cat([(z.T @ z).flatten() for z in layers_x])
        self.bb += torch.cat([(z.T @ z).flatten() for z in layers_y])
        both = torch.cat([q, p], 1)
        x_both, y_both = x.T @ both, y.T @ both
        a = len(wa)
        for total, part in ((self.x_q, x_both[:, :a]), (self.x_p, x_both[:, a:]), (self.y_q, y_both[:, :a]),
                            (self.y_p, y_both[:, a:])):  # fmt: skip
            total += part
        q, p = q.double(), p.double()
        for total, part in ((self.qp, q.T @ p), (self.qq, q.T @ q), (self.pp, p.T @ p), (self.x, x.sum(0)),
                            (self.y, y.sum(0)), (self.q, q.sum(0)), (self.p, p.sum(0))):  # fmt: skip
            total += part

    def pair(self, i: int, j: int, wa: tuple[int, ...], wb: tuple[int, ...]) -> _PairSums:
        """The sums of layer i of a with layer j of b."""
        u, v = _columns(wa, i), _columns(wb, j)
        return _PairSums(
            self.n, self.c[u, v], self.x[u], self.y[v], self.q[i], self.p[j], self.qp[i, j], self.y_q[v, i],
            self.x_p[u, j],
        )  # fmt: skip

    def own(self, side: int, i: int, widths: tuple[int, ...]) -> _PairSums:
        """The sums of a layer with itself."""
        start, w, u = sum(k * k for k in widths[:i]), widths[i], _columns(widths, i)
        c = (self.bb if side else self.aa)[start : start + w * w].view(w, w)
        total, norms = (self.y[u], self.p[i]) if side else (self.x[u], self.q[i])
        squared, weighted = (self.pp[i, i], self.y_p[u, i]) if side else (self.qq[i, i], self.x_q[u, i])
        return _PairSums(self.n, c, total, total, norms, norms, squared, weighted, weighted)

    def shifted(self, dx: Tensor, dy: Tensor, wa: tuple[int, ...], wb: tuple[int, ...]) -> _GridSums:
        """The same sums of the rows x - dx, y - dy."""
        out = _GridSums.empty(wa, wb)
        out.n = self.n
        for side, (widths, d) in enumerate(((wa, dx), (wb, dy))):
            for i in range(len(widths)):
                u, moved = _columns(widths, i), self.own(side, i, widths)
                moved = moved.shifted(d[u], d[u])
                start = sum(k * k for k in widths[:i])
                (out.bb if side else out.aa)[start : start + widths[i] ** 2] = moved.c.flatten()
                (out.y if side else out.x)[u], (out.p if side else out.q)[i] = moved.sum_x, moved.q
                (out.pp if side else out.qq)[i, i], (out.y_p if side else out.x_q)[u, i] = moved.qp, moved.q_y
        for i in range(len(wa)):
            for j in range(len(wb)):
                u, v = _columns(wa, i), _columns(wb, j)
                moved = self.pair(i, j, wa, wb).shifted(dx[u], dy[v])
                out.c[u, v], out.qp[i, j], out.y_q[v, i], out.x_p[u, j] = moved.c, moved.qp, moved.q_y, moved.p_x
        return out


def _columns(widths: tuple[int, ...], i: int) -> slice:
    start = sum(widths[:i])
    return slice(start, start + widths[i])


@dataclass(frozen=True, eq=False)
class _PairSums:
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

    def shifted(self, dx: Tensor, dy: Tensor) -> _PairSums:
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
        return _PairSums(n, cross, m - n * dx, k - n * dy, q, p, qp, q_y, p_x)

    def hsic(self) -> float:
        """Song's unbiased HSIC; the rows should be centred, for the rounding."""
        n, m, k = self.n, self.sum_x, self.sum_y
        product = self.c.square().sum() - self.qp
        rows = m @ self.c @ k - k @ self.q_y - m @ self.p_x + self.qp
        whole = (m @ m - self.q) * (k @ k - self.p) / ((n - 1) * (n - 2))
        return float((product + whole - 2 * rows / (n - 2)) / (n * (n - 3)))
