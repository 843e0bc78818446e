"""How much do two representations of the same rows vary together, without the bias of small samples?

Unbiased HSIC with linear kernels (Song et al. 2012; eq. 3 of Nguyen, Raghu & Kornblith 2020). With K, L the Gram
matrices with zero diagonal, U-centred (Szekely & Rizzo 2014: `Ku_ij = K_ij - r_i/(n-2) - r_j/(n-2) + s/((n-1)(n-2))`,
zero diagonal):

    HSIC_u = <Ku, Lu> / (n (n-3))

A U-centred matrix has zero row sums, so with P_i = sum_j Ku_ij Lu_ij and m = n-1 the value without row i is
`(sum P - 2 P_i (m-1)/(m-2)) / (m (m-3))`: every leave-one-out value of every pair of layers costs nothing extra.

Cost: up to GRAM_ROWS rows O(n^2 (d + layers)) per layer in row blocks, so that no [n, n] array is kept; above, from
features, O(n d_x d_y) per pair. Misleads when rows of one document are dependent: then use `hsic_documents`. Not
clamped: it can be negative.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from engram_interp.shapes import Float, Int64, Tensor

GRAM_ROWS = 4096
_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class HSICCells:
    """HSIC of every layer of one model (a) with every layer of another (b), of each with itself, and the leave-one-out
    values.

    `u` units were left out one at a time: rows, or documents.
    """

    ab: Float[Tensor, "a b"]
    aa: Float[Tensor, " a"]
    bb: Float[Tensor, " b"]
    loo_ab: Float[Tensor, "a b u"]
    loo_aa: Float[Tensor, "a u"]
    loo_bb: Float[Tensor, "b u"]

    def cka(self) -> Float[Tensor, "a b"]:
        """HSIC_ab / sqrt(HSIC_aa HSIC_bb); NaN where a self term is not positive."""
        return _ratio(self.ab, self.aa[:, None] * self.bb[None], (self.aa[:, None] > 0) & (self.bb[None] > 0))

    def loo_cka(self) -> Float[Tensor, "a b u"]:
        """CKA with each unit left out."""
        positive = (self.loo_aa[:, None] > 0) & (self.loo_bb[None] > 0)
        return _ratio(self.loo_ab, self.loo_aa[:, None] * self.loo_bb[None], positive)


def hsic_rows(layers_a: Sequence[Tensor], layers_b: Sequence[Tensor]) -> HSICCells:
    """HSIC of all pairs, rows independent.

    Args: layers_a, layers_b: float64 `[n, d]` each, centred by the caller (HSIC does not depend on it, its rounding
    does). n >= 4; the leave-one-out values are NaN for n = 4.
    """
    n = len(layers_a[0])
    products = _gram_products if n <= GRAM_ROWS else _feature_products
    p_ab, p_aa, p_bb = products(layers_a, layers_b)

    def finish(p: Tensor) -> tuple[Tensor, Tensor]:
        if n <= GRAM_ROWS:
            return p.sum(-1) / (n * (n - 3)), _leave_one_out(p)
        return p[..., 0], p[..., 1:]

    (ab, loo_ab), (aa, loo_aa), (bb, loo_bb) = finish(p_ab), finish(p_aa), finish(p_bb)
    return HSICCells(ab, aa, bb, loo_ab, loo_aa, loo_bb)


def permuted_cka(
    layers_a: Sequence[Tensor], layers_b: Sequence[Tensor], orders: Int64[Tensor, "permutations n"]
) -> Iterator[Float[Tensor, "a b"]]:
    """The CKA heat map for every reordering of b's rows: one product of flattened Grams each, self terms unchanged.

    Keeps one [n, n] array per layer: for at most GRAM_ROWS rows, and as many layers as memory allows.
    """
    n = len(layers_a[0])
    grams_a, grams_b = (
        torch.stack([_u_centred(x, _off_diagonal_sums(x), slice(0, n)) for x in layers])
        for layers in (layers_a, layers_b)
    )
    aa, bb = grams_a.square().sum((1, 2)), grams_b.square().sum((1, 2))
    flat = grams_a.flatten(1)
    for order in orders:
        ab = flat @ grams_b[:, order][:, :, order].flatten(1).T
        yield ab / (aa[:, None] * bb[None]).sqrt()


def row_blocks(n: int, layers: int) -> list[slice]:
    """Blocks of rows whose Gram rows of all layers together stay within a fixed memory."""
    block = max(1, min(n, _BLOCK_BYTES // (8 * n * layers)))
    return [slice(start, min(n, start + block)) for start in range(0, n, block)]


def _leave_one_out(p: Tensor) -> Tensor:
    m = p.shape[-1] - 1
    if m < 4:
        return torch.full_like(p, torch.nan)
    return (p.sum(-1, keepdim=True) - 2 * p * (m - 1) / (m - 2)) / (m * (m - 3))


def _gram_products(layers_a: Sequence[Tensor], layers_b: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """P_i of U-centred Grams for all pairs of layers: [a, b, n], [a, n], [b, n]."""
    n = len(layers_a[0])
    sums_a, sums_b = [[_off_diagonal_sums(x) for x in layers] for layers in (layers_a, layers_b)]
    ab, aa, bb = [], [], []
    for rows in row_blocks(n, len(layers_a) + len(layers_b)):
        a = torch.stack([_u_centred(x, r, rows) for x, r in zip(layers_a, sums_a, strict=True)], 1)
        b = torch.stack([_u_centred(x, r, rows) for x, r in zip(layers_b, sums_b, strict=True)], 1)
        ab.append(a @ b.mT)
        aa.append(a.square().sum(-1))
        bb.append(b.square().sum(-1))
    return torch.cat(ab).permute(1, 2, 0), torch.cat(aa).T, torch.cat(bb).T


def _off_diagonal_sums(x: Tensor) -> Tensor:
    return x @ x.sum(0) - x.square().sum(1)


def _u_centred(x: Tensor, sums: Tensor, rows: slice) -> Tensor:
    """A block of rows of the U-centred Gram matrix: [block, n]."""
    n = len(x)
    gram = x[rows] @ x.T - (sums[rows, None] + sums[None]) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
    index = torch.arange(rows.start, rows.stop)
    gram[index - rows.start, index] = 0.0
    return gram


def _feature_products(layers_a: Sequence[Tensor], layers_b: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The value and then every leave-one-out value of all pairs, without any Gram matrix: [a, b, 1 + n], ..."""
    ab = torch.stack([torch.stack([_pair_from_features(x, y) for y in layers_b]) for x in layers_a])
    aa = torch.stack([_pair_from_features(x, x) for x in layers_a])
    bb = torch.stack([_pair_from_features(y, y) for y in layers_b])
    return ab, aa, bb


def _pair_from_features(x: Tensor, y: Tensor) -> Tensor:
    """HSIC_u and its n leave-one-out values, all from `x'y`: every sum over Gram entries is a sum over rows."""
    n = len(x)
    q, p = x.square().sum(1), y.square().sum(1)
    r, s = _off_diagonal_sums(x), _off_diagonal_sums(y)
    products = ((x @ (x.T @ y)) * y).sum(1) - q * p  # (K o L) 1
    ks, lr = x @ (x.T @ s) - q * s, y @ (y.T @ r) - p * r
    whole = _song(products.sum(), r.sum(), s.sum(), r @ s, n)
    without = _song(
        products.sum() - 2 * products,
        r.sum() - 2 * r,
        s.sum() - 2 * s,
        r @ s - r * s - ks - lr + products,
        n - 1,
    )
    return torch.cat([whole[None], without])


def _song(product: Tensor, k: Tensor, l: Tensor, rows: Tensor, n: int) -> Tensor:
    return (product + k * l / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3))


def _ratio(numerator: Tensor, squared: Tensor, defined: Tensor) -> Tensor:
    return torch.where(defined, numerator / squared.clamp_min(1e-300).sqrt(), torch.nan)
