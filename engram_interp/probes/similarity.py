"""Is an Engram layer like a deeper layer of the baseline?

CKA of every residual site of the baseline (rows) with every site of the Engram model (columns), 0 being the embedding
output and i the stream after block i, on rows of both models at the same tokens; then the paper's soft alignment index
(eq. 9) with its null from a control, the profile match, and sentences that say what may be claimed (`measure.cka`,
`measure.alignment`). With a control, another seed of the baseline, both seed pairs are evaluated: each baseline against
the Engram model, with the other baseline as its null.

Cost: one forward per text and model, then O(rows^2 (sum of D + sites^2)) per heat map, five of them with a control, and
as much again per permutation. Misleads when both models start from one initialisation seed, which inflates the shallow
cells, and at sites where a warning names a massive feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from engram_interp.measure.alignment import (
    PAPER_K,
    half_sample_heatmaps,
    half_sample_probabilities,
    half_sample_weights,
)
from engram_interp.measure.alignment import calibrated_depth as _calibrated_depth
from engram_interp.measure.alignment_claim import Claim, SeedPairEvidence, alignment_claim, seed_pair_evidence
from engram_interp.measure.cka import CKAMatrix, cka_matrix
from engram_interp.measure.statistics import LEVEL
from engram_interp.models.protocol import Decoder
from engram_interp.probes.heatmap_file import plain
from engram_interp.probes.residual_rows import (
    MarkedText,
    Positions,
    RowPlan,
    has_start_token,
    plan_rows,
    read_rows,
    require_same_tokenizer,
)
from engram_interp.runs import Provenance, texts_hash

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

MAX_ROWS = 4096
_HALF_SAMPLES = 400


@dataclass(frozen=True, eq=False)
class CKAHeatmap:
    """Baseline sites (rows) by Engram sites (columns), and what follows for depth.

    `evidence`: one entry per seed pair, the given baseline first. `best_probability[i, j]`: share of half-samples of
    the documents in which baseline site i is the best match of Engram site j. `control`: the heat map of baseline
    against control, None without.
    """

    matrix: CKAMatrix
    control: Float[np.ndarray, "rows control"] | None
    evidence: tuple[SeedPairEvidence, ...]
    best_probability: Float[np.ndarray, "rows columns"]
    claims: tuple[Claim, ...]
    names: dict[str, str]
    positions: Positions
    warnings: tuple[str, ...]
    provenance: Provenance = field(repr=False)

    @property
    def values(self) -> Float[np.ndarray, "rows columns"]:
        """The heat map itself."""
        return self.matrix.values

    @property
    def rows(self) -> list[int]:
        """Residual sites of the baseline."""
        return list(range(self.values.shape[0]))

    @property
    def columns(self) -> list[int]:
        """Residual sites of the Engram model."""
        return list(range(self.values.shape[1]))

    @property
    def calibrated(self) -> Float[np.ndarray, " columns"]:
        """Depth at which the null shows the same soft alignment index."""
        return _calibrated_depth(self.evidence[0].index, self.evidence[0].null_index)

    def table(self) -> pd.DataFrame:
        """One row per cell: both sites, CKA with its interval, the companions, probability of being the best match."""
        import pandas as pd

        i, j = (index.ravel() for index in np.indices(self.values.shape))
        cells = {"cka": self.values, "low": self.matrix.low, "high": self.matrix.high, **self.matrix.companions}
        columns = {name: m.ravel() for name, m in cells.items()}
        return pd.DataFrame({"baseline": i, "engram": j, **columns, "best_match": self.best_probability.ravel()})

    def depths(self) -> pd.DataFrame:
        """One row per Engram site and seed pair: every estimate of its depth, its null, and the claim."""
        import pandas as pd

        verdicts = [c.verdict for c in self.claims]
        frames = [
            pd.DataFrame(
                {
                    "engram": self.columns, "seed_pair": e.pair, "profile_match": e.depth, "low": e.low, "high": e.high,
                    "null_depth": e.null_depth, "parabola": e.parabola, "soft_alignment": e.index,
                    "soft_alignment_null": e.null_index, "beyond_null": e.beyond_null.shift,
                    "beyond_null_low": e.beyond_null.low, "beyond_null_high": e.beyond_null.high, "claim": verdicts,
                }
            )
            for e in self.evidence
        ]  # fmt: skip
        return pd.concat(frames, ignore_index=True)

    def figure(self) -> go.Figure:
        """The heat map with the soft alignment, its null and the profile match drawn over it."""
        from engram_interp.figures.heatmap import heatmap_figure

        first = self.evidence[0]
        null = "null: another seed" if first.seed_null else "null: baseline itself"
        curves = {f"soft alignment, k = {first.k}": first.index, null: first.null_index, "profile match": first.depth}
        return heatmap_figure(
            self.values, self.rows, self.columns, curves=curves, low=self.matrix.low, high=self.matrix.high,
            title=f"CKA over {self.matrix.n} rows of {self.matrix.documents} documents ({self.positions})",
            row_title=f"{self.names['baseline']}, residual site", column_title=f"{self.names['engram']}, residual site",
        )  # fmt: skip

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON; what is undefined is null."""
        first, m = self.evidence[0], self.matrix
        spreads = {
            side: [s.as_dict() for s in spread] for side, spread in (("baseline", m.spread_a), ("engram", m.spread_b))
        }
        return plain(
            {
                "models": self.names, "rows": self.rows, "columns": self.columns, "cka": self.values,
                "low": m.low, "high": m.high, "level": m.level, "n": m.n, "documents": m.documents,
                "positions": self.positions,
                "soft_alignment": {
                    "k": first.k, "engram": first.index, "null": first.null_index,
                    "null_from": "control" if first.seed_null else "baseline itself", "calibrated": self.calibrated,
                },
                "profile_match": first.depth, "profile_match_low": first.low, "profile_match_high": first.high,
                "parabola_argmax": first.parabola, "best_probability": self.best_probability, "control": self.control,
                "seed_pairs": [e.as_dict() for e in self.evidence], "claims": [c.as_dict() for c in self.claims],
                "diagnostics": {**spreads, "companions": m.companions, "null_max": m.null_max},
                "warnings": self.warnings, "provenance": self.provenance.as_dict(),
            }
        )  # fmt: skip


def cka_heatmap(
    engram: Decoder,
    baseline: Decoder,
    texts: Sequence[MarkedText],
    positions: Positions = "entity_final",
    *,
    control: Decoder | None = None,
    k: int = PAPER_K,
    permutations: int = 0,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    level: float = LEVEL,
) -> CKAHeatmap:
    """CKA of all residual sites of two models, with the depths that follow.

    Args:
        engram, baseline: any two decoders with the same tokenizer; widths and numbers of layers may differ.
        texts: plain texts, `(text, [(start, end), ...])` with character spans of entities, or gallery sentences.
        positions: rows at the last token of every entity (the paper's choice), at one token per text, or at every
        token. The start
            token is never a row.
        control: another seed of the baseline; without it the null is the baseline itself and no depth is claimed.
        permutations: size of the max-|CKA| null over shuffled documents (100 is enough for a 95 % line).
        max_rows: above it every text keeps an equal random share of its rows.

    Raises:
        ValueError: different tokenizers, no texts or spans, fewer than 4 documents, k larger than the number of sites,
        a
            constant or non-finite site.

    >>> import engram_interp
    >>> from engram_interp.gallery import load_gallery
    >>> from engram_interp.probes import cka_heatmap
    >>> moe = engram_interp.load("mini-moe")
    >>> heat = cka_heatmap(moe, moe, load_gallery()[:8])
    >>> heat.values.shape == (moe.layers + 1, moe.layers + 1)
    True
    >>> bool(abs(heat.values.diagonal() - 1).max() < 1e-9)  # a model is like itself
    True
    """
    models = {"engram": engram, "baseline": baseline} | ({"control": control} if control else {})
    require_same_tokenizer(list(models.values()))
    _require_k(models, k)
    rng = np.random.default_rng(seed)
    skip_first = not all(has_start_token(model) for model in models.values())
    plan = plan_rows(engram.tokenizer, texts, positions, max_rows=max_rows, rng=rng, skip_first=skip_first)
    rows = {role: read_rows(model, plan) for role, model in models.items()}
    names = {role: model.identity.name for role, model in models.items()}
    heat = _Heat(rows, plan.documents, names, level)
    matrix = heat("baseline", "engram", companions=True, permutations=permutations, rng=rng)
    weights = half_sample_weights(matrix.documents, _HALF_SAMPLES, rng)
    evidence, control_map = _evidence(heat, matrix, weights, k, control is not None)
    claims = tuple(
        alignment_claim(
            evidence, j, engram=names["engram"], baseline=names["baseline"], unrelated=matrix.null_max, level=level
        )
        for j in range(matrix.values.shape[1])
    )  # fmt: skip
    draws = half_sample_heatmaps(matrix.values, matrix.leave_one_out, weights)
    options = {
        "positions": positions,
        "k": k,
        "permutations": permutations,
        "seed": seed,
        "max_rows": max_rows,
        "level": level,
    }
    identities = {m.identity.name: m.identity.weights_sha256 for m in models.values()}
    return CKAHeatmap(
        matrix, control_map, evidence, half_sample_probabilities(draws), claims, names, positions,
        _plan_warnings(plan, matrix, control is not None) + matrix.warnings,
        Provenance(identities, texts_hash(plan.texts), len(plan.texts), options),
    )  # fmt: skip


@dataclass(frozen=True)
class _Heat:
    """Heat maps of two of the models, by role, over the same rows."""

    rows: dict[str, list]
    documents: np.ndarray
    names: dict[str, str]
    level: float

    def __call__(
        self, a: str, b: str, *, companions: bool = False, permutations: int = 0, rng: np.random.Generator | None = None
    ) -> CKAMatrix:
        labels = {
            role: [f"{self.names[role]}, residual site {i}" for i in range(len(self.rows[role]))] for role in (a, b)
        }
        return cka_matrix(
            self.rows[a], self.rows[b], groups=self.documents, permutations=permutations, rng=rng,
            companions=companions, level=self.level, names_a=labels[a], names_b=labels[b],
        )  # fmt: skip


def _evidence(
    heat: _Heat, matrix: CKAMatrix, weights: np.ndarray, k: int, has_control: bool
) -> tuple[tuple[SeedPairEvidence, ...], np.ndarray | None]:
    """Evidence per seed pair, and the heat map of baseline against control."""
    pair = f"{heat.names['engram']} against {heat.names['baseline']}"
    own, level = _loo(heat("baseline", "baseline")), heat.level
    if not has_control:
        return (seed_pair_evidence(pair, _loo(matrix), own, None, weights, k=k, level=level),), None
    control = heat("baseline", "control")
    values, without = _loo(control)
    second = seed_pair_evidence(
        f"{heat.names['engram']} against {heat.names['control']}", _loo(heat("control", "engram")),
        _loo(heat("control", "control")), (values.T, without.transpose(1, 0, 2)), weights, k=k, level=level,
    )  # fmt: skip
    first = seed_pair_evidence(pair, _loo(matrix), own, (values, without), weights, k=k, level=level)
    return (first, second), values


def _loo(matrix: CKAMatrix) -> tuple[np.ndarray, np.ndarray]:
    if not (np.isfinite(matrix.values).all() and np.isfinite(matrix.leave_one_out).all()):
        raise ValueError(
            f"expected enough documents for every cell of the heat map, found CKA undefined with {matrix.documents}: "
            + "; ".join(matrix.warnings[-3:])
        )
    return matrix.values, matrix.leave_one_out


def _require_k(models: dict[str, Decoder], k: int) -> None:
    for role in ("baseline", "control"):
        if role in models and not 1 <= k <= models[role].layers + 1:
            name, sites = models[role].identity.name, models[role].layers + 1
            raise ValueError(f"expected k between 1 and the {sites} residual sites of {name}, found {k}")


def _plan_warnings(plan: RowPlan, matrix: CKAMatrix, has_control: bool) -> tuple[str, ...]:
    notes = []
    if plan.dropped:
        notes.append(f"{plan.dropped} of {plan.dropped + plan.rows} rows left out at random, equally from every text")
    if matrix.documents < matrix.n:
        notes.append(f"{matrix.n} rows of {matrix.documents} documents: pairs of rows from one document are excluded")
    if not has_control:
        notes.append("no control: the null is the baseline itself, and no depth is claimed")
    return tuple(notes)
