"""How much do two representations vary together across documents, when rows inside a document are dependent?

The document-excluded U-statistic: the kernel of HSIC averaged over all ordered 4-tuples of rows from four *distinct*
documents,

    HSIC_doc = (1/c) sum_{i,j,k,l} [ K_ij L_ij + K_ij L_kl - 2 K_ij L_ik ],

exactly unbiased whatever the dependence inside a document, translation invariant for any document sizes n_g, and equal
to HSIC_u when every document has one row. Documents weigh by their size. All sums reduce to sums over documents:
with KD_ih = sum of K_ij over the rows j of document h (0 for the own document), A = D'KD, W_gh = sum_{i in g, j in h}
K_ij L_ij,

    sum 1 = sum_{g,h} W_gh [(N-n_g-n_h)^2 - Q + n_g^2 + n_h^2],   N = sum n, Q = sum n^2
    sum 2 = (1'A1)(1'B1) - 4 (A1)'(B1) + 2 <A, B>
    sum 3 = sum_i sum_{h != k} KD_ih LD_ik (N - n_{g(i)} - n_h - n_k)

and leaving one document out only subtracts the terms it takes part in. Cost: O(n G d) per layer and O(n^2) (Grams, in
row blocks) or O(n d_x d_y) (features) per pair. Misleads: a position code shared by both models is still counted as
similarity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engram_interp.measure.hsic import GRAM_ROWS, HSICCells, row_blocks
from engram_interp.shapes import Int64, Tensor


def hsic_documents(layers_a: Sequence[Tensor], layers_b: Sequence[Tensor], documents: Int64[Tensor, " n"]) -> HSICCells:
    """HSIC of all pairs over rows of distinct documents, with leave-one-document-out values.

    Args: layers_a, layers_b: centred float64 `[n, d]`; documents: 0 .. G-1 per row, each at least once.
    Raises: ValueError for fewer than 4 documents. With 4 the leave-one-out values are NaN.
    """
    sizes = documents.bincount()
    if len(sizes) < 4:
        raise ValueError(f"expected rows from at least 4 documents, found {len(sizes)}")
    moments = _gram_moments if len(documents) <= GRAM_ROWS else _feature_moments
    w_ab, w_aa, w_bb = moments(layers_a, layers_b, documents, sizes.double())
    a, b = ([_Sums.of(x, documents, sizes.double()) for x in layers] for layers in (layers_a, layers_b))
    tuples = _distinct_tuples(sizes.double())
    ab = torch.stack([torch.stack([_cell(x, y, w_ab[i, j], tuples) for j, y in enumerate(b)]) for i, x in enumerate(a)])
    aa = torch.stack([_cell(x, x, w_aa[i], tuples) for i, x in enumerate(a)])
    bb = torch.stack([_cell(y, y, w_bb[i], tuples) for i, y in enumerate(b)])
    return HSICCells(ab[..., 0], aa[..., 0], bb[..., 0], ab[..., 1:], aa[..., 1:], bb[..., 1:])


@dataclass(frozen=True)
class _Sums:
    """What one layer contributes: sums of its Gram matrix over documents."""

    kd: Tensor  # [n, G]
    r: Tensor  # [n], KD 1
    r_n: Tensor  # [n], KD sizes
    between: Tensor  # [G, G], A
    documents: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, x: Tensor, documents: Tensor, sizes: Tensor) -> _Sums:
        totals = _by_document(x, documents, len(sizes))
        kd = x @ totals.T
        kd[torch.arange(len(x)), documents] = 0.0
        return cls(kd, kd.sum(1), kd @ sizes, _by_document(kd, documents, len(sizes)), documents, sizes)


def _by_document(values: Tensor, documents: Tensor, count: int) -> Tensor:
    return values.new_zeros((count, *values.shape[1:])).index_add_(0, documents, values)


def _distinct_tuples(sizes: Tensor) -> Tensor:
    """Number of ordered 4-tuples of rows of distinct documents: with all documents, then without each. [1 + G]"""
    left = torch.cat([torch.zeros(1, dtype=sizes.dtype), sizes])
    p1, p2, p3, p4 = (sizes.pow(k).sum() - left.pow(k) for k in (1, 2, 3, 4))  # Newton's identities for 24 e_4
    return p1**4 - 6 * p1**2 * p2 + 3 * p2**2 + 8 * p1 * p3 - 6 * p4


def _cell(x: _Sums, y: _Sums, w: Tensor, tuples: Tensor) -> Tensor:
    """HSIC of one pair of layers: with all documents, then without each. [1 + G]"""
    total = _pairs_term(w, x.sizes) + _independent_term(x.between, y.between) - 2 * _triples_term(x, y)
    value = total / tuples
    return torch.where(tuples > 0.5, value, torch.nan)


def _pairs_term(w: Tensor, n: Tensor) -> Tensor:
    """sum 1, from w[p] = W n^p. [1 + G]"""
    w0, w1, w2 = w
    t0 = _drop(w0.sum(), 2 * w0)
    t1 = _drop(w1.sum(), w1 + n * w0)
    t2 = _drop(w2.sum(), w2 + n**2 * w0)
    t11 = _drop(n @ w1, 2 * n * w1)
    rows, squares = _drop(n.sum(), n), _drop(n @ n, n**2)
    return (rows**2 - squares) * t0 - 4 * rows * t1 + 4 * t2 + 2 * t11


def _independent_term(a: Tensor, b: Tensor) -> Tensor:
    """sum 2. [1 + G]"""
    alpha, beta, both = a.sum(1), b.sum(1), (a * b).sum(1)
    products = _drop(alpha @ beta, alpha * beta + a @ beta + b @ alpha - both)
    return _drop(alpha.sum(), 2 * alpha) * _drop(beta.sum(), 2 * beta) - 4 * products + 2 * _drop(both.sum(), 2 * both)


def _triples_term(x: _Sums, y: _Sums) -> Tensor:
    """sum 3. [1 + G]

    Row i gives f_i = r s - z, weighted by N - n_{g(i)}, minus h_i = r_n s + r s_n - 2 z_n, with z = sum_h KD LD.
    Without document g the rows of g go, and in every other row the entries of column g.
    """
    n, own = x.sizes, x.sizes[x.documents]
    z = (x.kd * y.kd).sum(1)
    z_n = (x.kd * y.kd) @ n
    f, h = x.r * y.r - z, x.r_n * y.r + x.r * y.r_n - 2 * z_n
    f_g, f_own_g, h_g = (_by_document(v, x.documents, len(n)) for v in (f, own * f, h))
    square, square_own = (x.kd * y.kd).sum(0), own @ (x.kd * y.kd)
    cross = x.kd.T @ y.r + y.kd.T @ x.r - 2 * square  # what column g takes from sum f
    cross_own = x.kd.T @ (own * y.r) + y.kd.T @ (own * x.r) - 2 * square_own
    cross_h = n * (x.kd.T @ y.r + y.kd.T @ x.r) + x.kd.T @ y.r_n + y.kd.T @ x.r_n - 4 * n * square
    sum_f, sum_own, sum_h = (
        _drop(f.sum(), f_g + cross),
        _drop(own @ f, f_own_g + cross_own),
        _drop(h.sum(), h_g + cross_h),
    )
    return _drop(n.sum(), n) * sum_f - sum_own - sum_h


def _drop(total: Tensor, parts: Tensor) -> Tensor:
    """A sum, then the sum without each document's part."""
    return torch.cat([total[None], total - parts])


def _gram_moments(
    layers_a: Sequence[Tensor], layers_b: Sequence[Tensor], documents: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """w[p, g] = sum_h W_gh n_h^p for p = 0, 1, 2 of all pairs: [a, b, 3, G], [a, 3, G], [b, 3, G]."""
    weights = torch.stack([sizes[documents] ** p for p in range(3)])
    ab, aa, bb = [], [], []
    for rows in row_blocks(len(documents), len(layers_a) + len(layers_b)):
        other = documents[rows, None] != documents[None]
        a = torch.stack([(x[rows] @ x.T) * other for x in layers_a], 1)
        b = torch.stack([(x[rows] @ x.T) * other for x in layers_b], 1)
        ab.append(torch.stack([(a * w) @ b.mT for w in weights], -1))
        aa.append(a.square() @ weights.T)
        bb.append(b.square() @ weights.T)
    reduced = (_by_document(torch.cat(parts), documents, len(sizes)) for parts in (ab, aa, bb))
    return tuple(m.movedim(0, -1) for m in reduced)  # type: ignore[return-value]


def _feature_moments(
    layers_a: Sequence[Tensor], layers_b: Sequence[Tensor], documents: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_gram_moments`, from features: sum_{i in g} x_i' C_p y_i - n_g^p |C_g|^2 with C_p = sum_j n_j^p x_j y_j'."""
    weights = [sizes[documents, None] ** p for p in range(3)]
    members = [(documents == g).nonzero()[:, 0] for g in range(len(sizes))]

    def pair(x: Tensor, y: Tensor) -> Tensor:
        inside = torch.stack([((x[m] @ x[m].T) * (y[m] @ y[m].T)).sum() for m in members])
        whole = (((x @ ((w * x).T @ y)) * y).sum(1) for w in weights)
        return torch.stack([_by_document(v, documents, len(sizes)) - sizes**p * inside for p, v in enumerate(whole)])

    ab = torch.stack([torch.stack([pair(x, y) for y in layers_b]) for x in layers_a])
    return ab, torch.stack([pair(x, x) for x in layers_a]), torch.stack([pair(y, y) for y in layers_b])
