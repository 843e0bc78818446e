"""Is a CKA value about the representation, or about one feature or one row?

One massive feature shared by two unrelated networks gives CKA 0.999; a private one hides a real similarity; massive
first tokens give 1.0. Three numbers catch all of these: the participation ratio `tr(C)^2 / tr(C^2)` of the covariance
(how many directions carry the variance), and the shares of `|C|_F^2` that vanish without the top feature and without
the top row. Beside them the same CKA after removing the suspect: rows divided by their rms (what the next layer's norm
reads), and the feature of largest variance dropped. Cost: O(n d min(n, d)) per layer. A high share is a warning about
the measure, not about the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from engram_interp.measure.hsic import GRAM_ROWS
from engram_interp.shapes import Float, Tensor

MIN_PARTICIPATION, MAX_SHARE, MAX_DISAGREEMENT = 3.0, 0.5, 0.1


@dataclass(frozen=True)
class Spread:
    """How the variance of one layer is spread; shares are of the squared Frobenius norm of the covariance (or Gram)
    matrix.

    `top_feature` has the largest variance; `top_row` (an index into the rows given) the largest share; -1 when no rows
    were kept.
    """

    participation_ratio: float
    top_feature: int
    top_feature_share: float
    top_row: int
    top_row_share: float

    def as_dict(self) -> dict[str, float | int]:
        """Plain data for JSON."""
        return asdict(self)

    def warnings(self, name: str) -> tuple[str, ...]:
        """What is wrong with this layer, in words."""
        found = []
        if self.participation_ratio < MIN_PARTICIPATION:
            found.append(f"{name}: participation ratio {self.participation_ratio:.2f} < {MIN_PARTICIPATION:g}")
        if self.top_feature_share > MAX_SHARE:
            found.append(f"{name}: feature {self.top_feature} carries {self.top_feature_share:.0%} of the similarity")
        if self.top_row_share > MAX_SHARE:
            found.append(f"{name}: row {self.top_row} carries {self.top_row_share:.0%} of the similarity")
        return tuple(found)


def spread(x: Float[Tensor, "n d"]) -> Spread:
    """Spread of centred float64 rows."""
    n, d = x.shape
    variance, norms = x.square().sum(0), x.square().sum(1)
    if d <= n or n > GRAM_ROWS:
        covariance = x.T @ x
        total, row_products = covariance.square().sum(), ((x @ covariance) * x).sum(1)
    else:
        gram = x @ x.T
        total, row_products = gram.square().sum(), gram.square().sum(1)
    rows = (2 * row_products - norms.square()) / total
    top, feature = int(rows.argmax()), int(variance.argmax())
    share = feature_share(x[:, feature] @ x, feature, total)
    return Spread(float(norms.sum() ** 2 / total), feature, share, top, float(rows[top]))


def feature_share(covariance_row: Float[Tensor, " d"], feature: int, total: Float[Tensor, ""]) -> float:
    """Share of `|C|_F^2` in one row and the same column of C."""
    return float((2 * covariance_row.square().sum() - covariance_row[feature].square()) / total)


def biased_cka(layers_a: Sequence[Tensor], layers_b: Sequence[Tensor]) -> Float[Tensor, "a b"]:
    """Kornblith et al. 2019 on centred rows: `|X'Y|^2 / (|X'X| |Y'Y|)`. About d/(n+d) for unrelated features."""
    ab = torch.stack([torch.stack([_frobenius2(x, y) for y in layers_b]) for x in layers_a])
    aa = torch.stack([_frobenius2(x, x) for x in layers_a])
    bb = torch.stack([_frobenius2(y, y) for y in layers_b])
    return ab / (aa[:, None] * bb[None]).sqrt()


def rms_rows(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Uncentred rows divided by their root mean square (a row of zeros stays), then centred."""
    rms = x.square().mean(1, keepdim=True).sqrt()
    scaled = x / torch.where(rms > 0, rms, 1.0)
    return scaled - scaled.mean(0)


def without_top_feature(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d1"]:
    """Centred rows without the feature of largest variance."""
    top = int(x.square().sum(0).argmax())
    return torch.cat([x[:, :top], x[:, top + 1 :]], 1)


def disagreements(value: float, companions: dict[str, float]) -> tuple[str, ...]:
    """A warning for every companion further than MAX_DISAGREEMENT from the value."""
    return tuple(
        f"{name} value {other:.3f} differs from {value:.3f} by more than {MAX_DISAGREEMENT:g}"
        for name, other in companions.items()
        if abs(other - value) > MAX_DISAGREEMENT
    )


def _frobenius2(x: Tensor, y: Tensor) -> Tensor:
    if len(x) < min(x.shape[1], y.shape[1]):
        return ((x @ x.T) * (y @ y.T)).sum()
    return (x.T @ y).square().sum()
