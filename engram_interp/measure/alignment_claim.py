"""What may be said about "Engram layer j is like baseline layer i"?

A depth is reported with three uncertainties (documents, methods, seeds), and "deeper" or "shallower" is claimed only
when the shift minus the shift that another *seed of the baseline* shows at the same layer excludes 0, simultaneously
over the layers, in every seed pair. Refused otherwise, and the sentence says why. Cost: negligible. Misleads when the
two seeds are too few: with one control there are two seed pairs, which share all documents and one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from engram_interp.measure.alignment import (
    PAPER_K,
    ShiftBand,
    half_sample_heatmaps,
    parabola_argmax,
    profile_match,
    profile_match_draws,
    shift_band,
    soft_alignment,
)

LooHeatmap = tuple[Float[np.ndarray, "_ _"], Float[np.ndarray, "_ _ u"]]
Verdict = Literal["deeper", "shallower", "none"]


@dataclass(frozen=True, eq=False)
class SeedPairEvidence:
    """Depth of every Engram layer in one baseline, and of every layer of another seed of it (the null), in layers.

    `depth`, `low`, `high`: profile match, with its interval over documents. `parabola`: refined argmax. `index`,
    `null_index`: the paper's soft alignment and its null. `null_depth`: profile match of the null. `best`: largest CKA
    in each column. `seed_null` is False when no other seed was given and the baseline stands against itself: then
    nothing may be claimed.
    """

    pair: str
    seed_null: bool
    k: int
    depth: Float[np.ndarray, " j"]
    low: Float[np.ndarray, " j"]
    high: Float[np.ndarray, " j"]
    parabola: Float[np.ndarray, " j"]
    index: Float[np.ndarray, " j"]
    null_index: Float[np.ndarray, " j"]
    null_depth: Float[np.ndarray, " j"]
    beyond_null: ShiftBand
    best: Float[np.ndarray, " j"]

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        plain: dict[str, object] = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}
        return plain | {"beyond_null": {k: v.tolist() for k, v in vars(self.beyond_null).items()}}


@dataclass(frozen=True)
class Claim:
    """A sentence that may be quoted. `allowed` is False when it only says why nothing may be claimed."""

    layer: int
    verdict: Verdict
    allowed: bool
    sentence: str

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


def seed_pair_evidence(
    pair: str,
    heatmap: LooHeatmap,
    baseline_self: LooHeatmap,
    null: LooHeatmap | None,
    weights: Float[np.ndarray, "samples u"],
    *,
    k: int = PAPER_K,
    level: float = 0.95,
) -> SeedPairEvidence:
    """Depths of one Engram model in one baseline.

    Args: heatmap, null: baseline (rows) against Engram, and against another seed of the baseline (columns), each with
        its leave-one-out heat maps over the same documents; None falls back to the baseline itself. weights:
        half-samples.
    Raises: ValueError when the null has another number of layers than the Engram model.
    """
    seed_null, null = null is not None, null or baseline_self
    if null[0].shape[1] != heatmap[0].shape[1]:
        raise ValueError(
            f"expected the control to have {heatmap[0].shape[1]} residual sites as the Engram model, "
            f"found {null[0].shape[1]}: its index at the same depth is the null"
        )
    draws, self_draws, null_draws = (half_sample_heatmaps(*m, weights) for m in (heatmap, baseline_self, null))
    depths, null_depths = profile_match_draws(draws, self_draws), profile_match_draws(null_draws, self_draws)
    depth, null_depth = profile_match(heatmap[0], baseline_self[0]), profile_match(null[0], baseline_self[0])
    low, high = np.quantile(depths, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return SeedPairEvidence(
        pair, seed_null, k, depth, np.minimum(low, depth), np.maximum(high, depth), parabola_argmax(heatmap[0]),
        soft_alignment(heatmap[0], k), soft_alignment(null[0], k), null_depth,
        shift_band(depth, null_depth, depths, null_depths, level), heatmap[0].max(0),
    )  # fmt: skip


def alignment_claim(
    evidence: Sequence[SeedPairEvidence],
    layer: int,
    *,
    engram: str = "Engram",
    baseline: str = "MoE",
    unrelated: float = float("nan"),
    level: float = 0.95,
) -> Claim:
    """What may be claimed about one Engram layer; the first seed pair gives the numbers, all of them must agree.

    Args: unrelated: the largest CKA that shuffled documents produce (NaN when not computed).
    Raises: ValueError without evidence or for a layer that does not exist.
    """
    if not evidence or not 0 <= layer < len(evidence[0].depth):
        raise ValueError(f"expected a layer in [0, {len(evidence[0].depth) if evidence else 0}), found {layer}")
    refusal = _refusal(evidence, layer, baseline, unrelated, level)
    if refusal:
        return Claim(layer, "none", False, f"No claim for {engram} layer {layer}: {refusal}.")
    first, depths = evidence[0], [e.depth[layer] for e in evidence]
    methods = [first.depth[layer], first.parabola[layer]]
    shift = first.depth[layer] - layer
    sentence = (
        f"{engram} layer {layer} matches {baseline} layer {first.depth[layer]:.1f} ({level:.0%} over documents "
        f"{first.low[layer]:.1f}-{first.high[layer]:.1f}; methods {min(methods):.1f}-{max(methods):.1f}; "
        f"{len(evidence)} seed pair{'s' * (len(evidence) > 1)} {min(depths):.1f}-{max(depths):.1f}); "
        f"shift {shift:+.1f}, seed-null shift at that depth {first.null_depth[layer] - layer:+.1f}; "
        f"paper's index {first.index[layer]:.1f} (null {first.null_index[layer]:.1f})."
    )
    return Claim(layer, "deeper" if first.beyond_null.shift[layer] > 0 else "shallower", True, sentence)


def _refusal(evidence: Sequence[SeedPairEvidence], layer: int, baseline: str, unrelated: float, level: float) -> str:
    """Why nothing may be claimed; "" when something may."""
    first = evidence[0]
    if first.best[layer] <= unrelated:
        return (
            f"its best CKA {first.best[layer]:.3f} does not exceed {unrelated:.3f}, "
            "which shuffled documents reach somewhere in the heat map"
        )
    if not all(e.seed_null for e in evidence):
        return (
            f"it reads as {baseline} layer {first.depth[layer]:.1f} (paper's index {first.index[layer]:.1f}; "
            f"the {baseline} against itself already reads {first.null_index[layer]:.1f}), but without another seed "
            f"of the {baseline} there is no null"
        )
    for e in evidence:
        band = e.beyond_null
        if band.low[layer] <= 0 <= band.high[layer]:
            return (
                f"it reads as {baseline} layer {e.depth[layer]:.1f}, and another seed of the {baseline} reads as "
                f"{e.null_depth[layer]:.1f} there; the difference {band.shift[layer]:+.1f} ({level:.0%} band over all "
                f"layers {band.low[layer]:+.1f} to {band.high[layer]:+.1f}, {e.pair}) is explained by the null"
            )
    if len({bool(e.beyond_null.shift[layer] > 0) for e in evidence}) > 1:
        return f"the seed pairs disagree on whether it is deeper or shallower than {baseline} layer {layer}"
    return ""
