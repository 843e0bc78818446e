"""Does one model's prediction form earlier than another's?

Paired over the same tokens, documents as the unit: the difference of KL(final || layer) per layer with a max-t band,
the area under the curve over layers 0 to L-1 (nats x layers), raw and divided by the mean KL(final || unigram) (the
better model has further to go), and the settling depth. Cost: a bootstrap over documents, seconds. Misleads: with one
checkpoint per architecture the intervals describe these two checkpoints only; two seeds of one architecture differ
"significantly" by this test. `compare_seeds` takes the seed as the unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from engram_interp.gallery import GallerySentence
from engram_interp.measure.statistics import (
    LEVEL,
    Band,
    Estimate,
    function_of_means,
    not_estimable,
    paired_difference,
    simultaneous_band,
)
from engram_interp.models.protocol import Decoder
from engram_interp.probes.lens import QUANTITIES, LensResult, logit_lens_kl
from engram_interp.probes.residual_rows import require_same_tokenizer
from engram_interp.runs import Provenance

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

ONE_SEED = "these two checkpoints only: one seed per arm, so nothing is said about the architectures"


@dataclass(frozen=True, eq=False)
class StratumComparison:
    """a - b over one set of tokens. `difference` per layer in the quantity's unit; the rest as in `LensComparison`."""

    a: Band
    b: Band
    difference: Band
    auc: Estimate
    auc_normalised: Estimate
    settling: Estimate
    tokens: int
    documents: int


@dataclass(frozen=True, eq=False)
class LensComparison:
    """Two models on the same tokens; every difference is first minus second, so negative KL means the first is earlier.

    `overall` covers all tokens, `strata` those with at least 2 documents. `auc`: nats x layers below the last;
    `auc_normalised`: in units of KL(final || unigram) x layers; `settling`: layers.
    """

    models: tuple[str, str]
    lens: str
    quantity: str
    overall: StratumComparison
    strata: Mapping[str, StratumComparison]
    statement: str
    provenance: Provenance

    @property
    def layers(self) -> list[int]:
        """Residual sites, 0 = embedding output."""
        return list(range(len(self.overall.difference.mean)))

    @property
    def arithmetic(self) -> str:
        """How KL was formed, and the largest error found on sampled tokens."""
        taken, error = (self.provenance.options[key] for key in ("arithmetic", "kl_error"))
        return f"arithmetic: {taken}" + ("" if error is None else f"; largest error of KL found {error:.1e} nats")

    def table(self) -> pd.DataFrame:
        """One row per stratum and layer, and one per summary (`auc`, `auc_normalised`, `settling`)."""
        import pandas as pd

        rows: list[dict[str, object]] = []
        for name, part in {"all": self.overall, **self.strata}.items():
            counts = {"stratum": name, "tokens": part.tokens, "documents": part.documents}
            for layer in self.layers:
                for arm, band in ((self.models[0], part.a), (self.models[1], part.b), ("difference", part.difference)):
                    interval = {"mean": band.mean[layer], "low": band.low[layer], "high": band.high[layer]}
                    rows.append({**counts, "arm": arm, "what": self.quantity, "layer": layer, **interval})
            for what in ("auc", "auc_normalised", "settling"):
                estimate: Estimate = getattr(part, what)
                interval = {"mean": estimate.value, "low": estimate.low, "high": estimate.high}
                rows.append({**counts, "arm": "difference", "what": what, "layer": pd.NA, **interval})
        return pd.DataFrame(rows)

    def figure(self, stratum: str | None = None) -> go.Figure:
        """Both curves with their simultaneous bands."""
        from engram_interp.figures.curve import Curve, curve_figure

        part = self.overall if stratum is None else self.strata[stratum]
        return curve_figure(
            [Curve(m, b.mean, b.low, b.high) for m, b in zip(self.models, (part.a, part.b), strict=True)],
            self.layers, x_title="layer (0 = embedding output)", y_title=QUANTITIES[self.quantity],
            title=f"When does the prediction form? {self.lens}, {stratum or 'all tokens'}",
        )  # fmt: skip

    def difference_figure(self) -> go.Figure:
        """The paired difference per layer for all tokens and for every stratum of the base partition."""
        from engram_interp.figures.curve import Curve, curve_figure

        parts = {"all tokens": self.overall} | {k: v for k, v in self.strata.items() if "-gram" not in k}
        return curve_figure(
            [Curve(k, p.difference.mean, p.difference.low, p.difference.high) for k, p in parts.items()],
            self.layers, x_title="layer (0 = embedding output)", y_title=f"difference of {QUANTITIES[self.quantity]}",
            title=f"{self.models[0]} minus {self.models[1]}, {self.lens}", zero=True,
        )  # fmt: skip

    def as_dict(self) -> dict[str, object]:
        """`layers`, `kl` per model and `difference` as mean, low, high; summaries, strata, counts, provenance."""
        return {
            "lens": self.lens,
            "layers": self.layers,
            self.quantity: dict(zip(self.models, map(_bounds, (self.overall.a, self.overall.b)), strict=True)),
            **_stratum_dict(self.overall),
            "strata": {name: _stratum_dict(part) for name, part in self.strata.items()},
            "statement": self.statement,
            "provenance": self.provenance.as_dict(),
        }


def read_and_compare(
    a: Decoder,
    b: Decoder,
    texts: Sequence[str | GallerySentence],
    *,
    quantity: str = "kl",
    seed: int = 0,
    **options: Any,
) -> LensComparison:
    """Read two models on the same texts and compare them; tokenizers and depths are compared before anything is read.

    Args: options: of `logit_lens_kl`.
    Raises: ValueError as `logit_lens_kl` and `compare_lens`.
    """
    require_same_tokenizer([a, b])
    if a.layers != b.layers:
        raise ValueError(f"expected the same number of blocks in both models, found {a.layers} and {b.layers}")
    return compare_lens(*(logit_lens_kl(model, texts, **options) for model in (a, b)), quantity=quantity, seed=seed)


def compare_lens(a: LensResult, b: LensResult, *, quantity: str = "kl", seed: int = 0) -> LensComparison:
    """Compare two models read by the same lens on the same texts, paired.

    Args: quantity: what the curves and the difference show; the area and its normalised form are always of KL.
    Raises: ValueError for different tokenizers, texts, lenses, streams or depths, or fewer than 2 documents.
    """
    _require_comparable(a, b)
    names = (a.model, b.model) if a.model != b.model else (f"{a.model} (first)", f"{b.model} (second)")
    strata = {
        name: mask
        for name, mask in a.strata.items()
        if name in b.strata and len(np.unique(a.document[mask & _usable(a, b, quantity)])) > 1
    }
    return LensComparison(
        models=names,
        lens=a.lens,
        quantity=quantity,
        overall=_compare(a, b, a.mask(), quantity, seed),
        strata={name: _compare(a, b, mask, quantity, seed) for name, mask in strata.items()},
        statement=ONE_SEED,
        provenance=Provenance(
            dict(zip(names, [next(iter(r.provenance.models.values())) for r in (a, b)], strict=True)),
            a.provenance.texts_sha256,
            a.provenance.texts,
            {**a.provenance.options, "kl_error": _larger(a.kl_error, b.kl_error), "quantity": quantity, "seed": seed},
        ),
    )


def earlier_beyond_null(comparison: LensComparison, null: LensComparison) -> Literal["earlier", "later", "undecided"]:
    """Whether the first model of a comparison forms its predictions earlier than the second, beyond what two seeds of
    one architecture differ by.

    Args: null: the second model against another seed of itself, on the same texts.
    Returns: "earlier" or "later" when the interval of the area lies beyond everything in the interval of the null, on
        either side of 0; else "undecided".
    """
    here, seeds = comparison.overall.auc, null.overall.auc
    beyond = max(abs(seeds.low), abs(seeds.high))
    return "earlier" if here.high < -beyond else "later" if here.low > beyond else "undecided"


def _require_comparable(a: LensResult, b: LensResult) -> None:
    if a.tokenizer_sha256 != b.tokenizer_sha256:
        raise ValueError(
            f"expected two models with one tokenizer, found different ones in {a.model!r} and {b.model!r}: "
            "next-token distributions over different vocabularies cannot be paired"
        )
    for what, left, right in (
        ("texts", a.provenance.texts_sha256, b.provenance.texts_sha256),
        ("lens", a.lens, b.lens),
        ("stream", a.stream, b.stream),
        ("precision", a.provenance.options["precision"], b.provenance.options["precision"]),
        ("quantities", a.provenance.options["quantities"], b.provenance.options["quantities"]),
        ("number of residual sites", a.sites, b.sites),
    ):
        if left != right:
            raise ValueError(f"expected the same {what} in both results, found {left} and {right}")
    if not (np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.document, b.document)):
        raise ValueError("expected the same tokens in both results, found different ones (do the start tokens differ?)")


def _usable(a: LensResult, b: LensResult, quantity: str) -> Bool[np.ndarray, " N"]:
    return np.all(np.isfinite(a.values(quantity)), axis=0) & np.all(np.isfinite(b.values(quantity)), axis=0)


def _compare(a: LensResult, b: LensResult, mask: np.ndarray, quantity: str, seed: int) -> StratumComparison:
    mask = mask & _usable(a, b, quantity)
    groups = a.document[mask]
    x, y = (r.values(quantity)[:, mask].T for r in (a, b))
    bands = [simultaneous_band(v, groups, rng=np.random.default_rng(seed)) for v in (x, y, x - y)]
    area, other_area = areas = [r.values("kl")[:-1, mask].sum(0) for r in (a, b)]
    return StratumComparison(
        *bands,
        auc=paired_difference(area, other_area, groups, rng=np.random.default_rng(seed)),
        auc_normalised=_normalised(areas, [r.unigram_kl[mask] for r in (a, b)], groups, seed),
        settling=_settling(a, b, mask, seed),
        tokens=int(mask.sum()),
        documents=len(np.unique(groups)),
    )


def _settling(a: LensResult, b: LensResult, mask: np.ndarray, seed: int) -> Estimate:
    groups = a.document[mask]
    if not (a.has_top1 and b.has_top1):
        return not_estimable("precision 'fast' gives no top-1", len(np.unique(groups)))
    settled, other = (r.settling_depth[mask].astype(np.float64) for r in (a, b))
    return paired_difference(settled, other, groups, rng=np.random.default_rng(seed))


def _larger(*errors: float | None) -> float | None:
    return max((e for e in errors if e is not None), default=None)


def _normalised(areas: list[np.ndarray], scales: list[np.ndarray], groups: np.ndarray, seed: int) -> Estimate:
    """Area / KL(final || unigram) of the first minus that of the second, each a ratio of means."""
    columns = np.stack([areas[0], scales[0], areas[1], scales[1]], 1).astype(np.float64)
    if not np.isfinite(columns).all():
        return not_estimable("KL(final || unigram) was not measured (quantities 'kl')", len(np.unique(groups)))
    if (columns.mean(0)[[1, 3]] <= 0).any():
        return not_estimable("KL(final || unigram) is not positive", len(np.unique(groups)))
    return function_of_means(
        columns, lambda m: m[..., 0] / m[..., 1] - m[..., 2] / m[..., 3], groups, rng=np.random.default_rng(seed)
    )


def _bounds(band: Band) -> dict[str, list[float]]:
    return {"mean": band.mean.tolist(), "low": band.low.tolist(), "high": band.high.tolist()}


def _stratum_dict(part: StratumComparison) -> dict[str, object]:
    summaries = {what: getattr(part, what).as_dict() for what in ("auc", "auc_normalised", "settling")}
    return {"difference": _bounds(part.difference), **summaries, "tokens": part.tokens, "documents": part.documents}


@dataclass(frozen=True, eq=False)
class SeedComparison:
    """Difference of the mean KL area between two architectures, training seed as the unit (Welch). nats x layers."""

    auc: Estimate
    a: Float[np.ndarray, " seeds"]
    b: Float[np.ndarray, " seeds2"]
    statement: str

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {"auc": self.auc.as_dict(), "a": self.a.tolist(), "b": self.b.tolist(), "statement": self.statement}


def compare_seeds(a: Sequence[LensResult], b: Sequence[LensResult], *, level: float = LEVEL) -> SeedComparison:
    """Compare architectures from several seeds each, on the same texts.

    Raises: ValueError for fewer than 2 seeds in an arm, or results that cannot be paired.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"expected at least 2 seeds per arm, found {len(a)} and {len(b)}: {ONE_SEED}")
    for other in (*a[1:], *b):
        _require_comparable(a[0], other)
    areas = [np.array([r.values("kl")[:-1].sum(0).mean() for r in arm]) for arm in (a, b)]
    test = stats.ttest_ind(*areas, equal_var=False)
    interval = test.confidence_interval(level)
    value = float(areas[0].mean() - areas[1].mean())
    se = float(np.sqrt(sum(x.var(ddof=1) / len(x) for x in areas)))
    estimate = Estimate(value, float(interval.low), float(interval.high), se, len(a) + len(b), level)
    return SeedComparison(estimate, *areas, statement=f"training seed as the unit: {len(a)} against {len(b)} seeds")
