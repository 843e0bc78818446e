"""When does the final prediction form?

Logit lens: every residual site (the embedding output first) is decoded by the model's own exit path and compared with
the final prediction; KL(final || site) in nats is what leaving the model there would lose (Belrose et al. 2023, eq. 3).
The last site is the final prediction, so its KL is exactly 0. Reverse KL, Jensen-Shannon, entropy, top-1, cross-entropy
to the true token and the settling depth (first site from which the top-1 never changes) come from the same pass.

With `quantities="kl"` only KL, cross-entropy and top-1 are formed, which costs little more than the products with the
unembedding (`engram_interp.kernels.lens_kl`); the others are NaN then. `precision="fast"` takes these products in
bfloat16: KL and cross-entropy alone, with `kl_error`, the largest deviation from the exact values on a sample.

Cost: one forward and L + 1 unembeddings; memory: at most 2,048 tokens' residuals and one chunk of logits at a time,
plus 28 bytes per token and site for the result. Start tokens are excluded and counted. Misleads: intermediate sites
need not speak the final basis, so a lower KL can be a matter of dialect: read it beside a tuned lens
(`engram_interp.probes.tuned_lens`), and compare models only by `compare_lens`, with seeds as the unit wherever there is
more than one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int64

from engram_interp.gallery import GallerySentence
from engram_interp.kernels.lens import LensError
from engram_interp.measure.statistics import Band, simultaneous_band
from engram_interp.models.protocol import Decoder
from engram_interp.models.text import start_tokens
from engram_interp.probes.lens_reading import (
    Arithmetic,
    Precision,
    Quantities,
    cut_text,
    form_readings,
    kept_ids,
    read_pieces,
)
from engram_interp.probes.lens_reading import Lens as Lens
from engram_interp.probes.strata import NgramCounts, as_text, text_strata
from engram_interp.runs import Provenance, texts_hash

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

QUANTITIES = {
    "kl": "KL(final || layer), nats",
    "reverse_kl": "KL(layer || final), nats",
    "jensen_shannon": "Jensen-Shannon divergence, nats",
    "entropy": "entropy, nats",
    "cross_entropy": "cross-entropy to the true token, nats",
    "agreement": "share of tokens with the final top-1",
}


@dataclass(frozen=True, eq=False)
class LensResult:
    """Readings of every site (axis L: embedding output, then after each block) at every token N of all documents.

    Units: nats; `settling_depth` and sites count from 0, the embedding output. `document` and `position` place each
    token in its text; `skipped` start tokens were left out. `strata` are masks over tokens.
    """

    model: str
    lens: str
    stream: int | None
    kl: Float[np.ndarray, "L N"]
    reverse_kl: Float[np.ndarray, "L N"]
    jensen_shannon: Float[np.ndarray, "L N"]
    entropy: Float[np.ndarray, "L N"]
    cross_entropy: Float[np.ndarray, "L N"]
    top1: Int64[np.ndarray, "L N"]
    final_top1: Int64[np.ndarray, " N"]
    unigram_kl: Float[np.ndarray, " N"]
    token_ids: Int64[np.ndarray, " N"]
    document: Int64[np.ndarray, " N"]
    position: Int64[np.ndarray, " N"]
    strata: Mapping[str, Bool[np.ndarray, " N"]]
    skipped: int
    tokenizer_sha256: str
    provenance: Provenance

    @property
    def sites(self) -> int:
        """Number of residual sites, blocks + 1."""
        return len(self.kl)

    @property
    def tokens(self) -> int:
        """Tokens read."""
        return self.kl.shape[1]

    @property
    def documents(self) -> int:
        """Documents read."""
        return len(np.unique(self.document))

    @property
    def kl_error(self) -> float | None:
        """Largest deviation of KL from float64 (precision "fast": from exact) on sampled tokens, nats; None without."""
        return self.provenance.options["kl_error"]  # type: ignore[return-value]

    @property
    def has_top1(self) -> bool:
        """Whether top-1 predictions were formed; precision "fast" gives none."""
        return bool((self.final_top1 >= 0).all())

    @property
    def agreement(self) -> Bool[np.ndarray, "L N"]:
        """Whether a site's top-1 is the final one.

        Raises: LensError where there is no top-1.
        """
        if not self.has_top1:
            raise LensError("expected top-1 predictions, found a reading with precision 'fast', which gives none")
        return self.top1 == self.final_top1

    @property
    def settling_depth(self) -> Int64[np.ndarray, " N"]:
        """First site from which the top-1 is the final one to the end; `sites` if there is none (single streams)."""
        settled = np.logical_and.accumulate(self.agreement[::-1], axis=0)
        return self.sites - settled.sum(0)

    def values(self, quantity: str = "kl") -> Float[np.ndarray, "L N"]:
        """A quantity by name, NaN where it was not formed.

        Raises: ValueError listing the names.
        """
        if quantity not in QUANTITIES:
            raise ValueError(f"unknown quantity {quantity!r}: expected one of {', '.join(QUANTITIES)}")
        if quantity == "agreement" and not self.has_top1:
            return np.full(self.kl.shape, np.nan)
        return getattr(self, quantity).astype(np.float64)

    def mask(self, stratum: str | None = None) -> Bool[np.ndarray, " N"]:
        """The tokens of a stratum (None: all).

        Raises: ValueError listing the strata.
        """
        if stratum is None:
            return np.ones(self.tokens, dtype=bool)
        if stratum not in self.strata:
            raise ValueError(
                f"unknown stratum {stratum!r}: expected one of {', '.join(self.strata) or 'none recorded'}"
            )
        return self.strata[stratum]

    def document_means(self, quantity: str = "kl", stratum: str | None = None) -> Float[np.ndarray, "documents L"]:
        """Mean per document and site, NaN for a document without a token in the stratum."""
        values, mask = self.values(quantity), self.mask(stratum)
        means = np.full((self.documents, self.sites), np.nan)
        for row, document in enumerate(np.unique(self.document)):
            chosen = values[:, mask & (self.document == document)]
            chosen = chosen[:, np.isfinite(chosen).all(0)]
            if chosen.shape[1]:
                means[row] = chosen.mean(1)
        return means

    def band(self, quantity: str = "kl", stratum: str | None = None, *, seed: int = 0) -> Band:
        """Mean over tokens per site with a band that covers all sites at once; documents are the unit.

        Raises: ValueError for fewer than 2 documents in the stratum.
        """
        values = self.values(quantity)
        mask = self.mask(stratum) & np.isfinite(values).all(0)
        return simultaneous_band(values[:, mask].T, self.document[mask], rng=np.random.default_rng(seed))

    def table(self) -> pd.DataFrame:
        """One row per stratum, quantity and site: mean, median, band (NaN with fewer than 2 documents), counts."""
        import pandas as pd

        rows: list[dict[str, object]] = []
        for stratum in (None, *self.strata):
            for quantity in QUANTITIES:
                rows.extend(self._table_rows(stratum, quantity))
        return pd.DataFrame(rows)

    def _table_rows(self, stratum: str | None, quantity: str) -> Iterator[dict[str, object]]:
        values = self.values(quantity)
        mask = self.mask(stratum) & np.isfinite(values).all(0)
        documents = len(np.unique(self.document[mask]))
        band = self.band(quantity, stratum) if documents > 1 else None
        for site in range(self.sites if mask.any() else 0):
            yield {
                "model": self.model, "lens": self.lens, "stream": self.stream, "stratum": stratum or "all",
                "quantity": quantity, "layer": site, "mean": values[site, mask].mean(),
                "median": float(np.median(values[site, mask])),
                "low": band.low[site] if band else np.nan, "high": band.high[site] if band else np.nan,
                "tokens": int(mask.sum()), "documents": documents,
            }  # fmt: skip

    def figure(self, quantity: str = "kl", stratum: str | None = None) -> go.Figure:
        """The curve over sites, with its band when there are at least 2 documents."""
        from engram_interp.figures.curve import Curve, curve_figure

        curve = self._curve(quantity, stratum)
        return curve_figure(
            [Curve(self.model, *curve)], list(range(self.sites)), x_title="layer (0 = embedding output)",
            y_title=QUANTITIES[quantity], title=f"When does the prediction form? {self.lens}, {self.model}",
        )  # fmt: skip

    def _curve(self, quantity: str, stratum: str | None) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        values = self.values(quantity)
        mask = self.mask(stratum) & np.isfinite(values).all(0)
        if len(np.unique(self.document[mask])) < 2:
            return values[:, mask].mean(1), None, None
        band = self.band(quantity, stratum)
        return band.mean, band.low, band.high

    def as_dict(self) -> dict[str, object]:
        """`layers`, `kl` {model: mean, low, high} (low and high None with one document), counts, provenance."""
        mean, low, high = self._curve("kl", None)
        bounds = {"low": None if low is None else low.tolist(), "high": None if high is None else high.tolist()}
        return {
            "lens": self.lens,
            "layers": list(range(self.sites)),
            "kl": {self.model: {"mean": mean.tolist(), **bounds}},
            "tokens": self.tokens,
            "documents": self.documents,
            "skipped_start_tokens": self.skipped,
            "kl_error": self.kl_error,
            "provenance": self.provenance.as_dict(),
        }


def logit_lens_kl(
    model: Decoder,
    texts: Sequence[str | GallerySentence],
    *,
    lens: Lens | None = None,
    stream: int | None = None,
    reference: NgramCounts | None = None,
    unigram: Float[np.ndarray, " V"] | None = None,
    quantities: Quantities = "all",
    precision: Precision = "exact",
) -> LensResult:
    """Read every site of a model at every token of some texts.

    Args: texts: plain, or marked with entities (each is one document); lens: a tuned lens, None is the logit lens;
        stream: read this residual stream alone (repeated, so that the model's own exit applies) against the final
        prediction of all; reference: n-gram counts for frequency strata; unigram: log-probabilities of the vocabulary
        against which the final prediction is measured, by default the add-one counts of these texts;
        quantities: "kl" leaves reverse KL, Jensen-Shannon, entropy and the distance to the unigram at NaN;
        precision: "fast" multiplies in bfloat16 (quantities "kl" only, no top-1), exact where this machine cannot; the
        choice and its reason are in the provenance, its error is `kl_error`.
    Raises: ValueError for names that are not known; LensError (a ValueError) for no texts, an empty text, a stream the
        model has not, logits below float32, or a residual that is not finite (layer, position and text named).

    >>> import engram_interp
    >>> from engram_interp.probes import logit_lens_kl
    >>> model = engram_interp.load("mini-moe")
    >>> result = logit_lens_kl(model, ["The river Seine flows through Paris.", "Aristotle taught Alexander the Great."])
    >>> result.kl.shape == (model.layers + 1, result.tokens)
    True
    >>> float(abs(result.kl[-1]).max())  # the last site is the prediction itself
    0.0
    """
    if isinstance(texts, str):
        raise LensError("expected a list of texts, found one string")
    if not len(texts):
        raise LensError("expected at least one text, found none")
    if lens is not None:
        lens.check(model)
    cuts = [cut_text(model, as_text(item), number) for number, item in enumerate(texts)]
    start = len(start_tokens(model))
    ids = [kept_ids(windows_, start) for windows_ in cuts]
    if unigram is None:
        unigram = unigram_log_probabilities(ids, model.vocab_size)
    arithmetic = Arithmetic.of(model, unigram, quantities, precision)
    readings = form_readings(arithmetic, read_pieces(model, cuts, ids, start, lens, stream))
    strata = [text_strata(model.tokenizer, item, i, reference) for item, i in zip(texts, ids, strict=True)]
    return LensResult(
        model=model.identity.name,
        lens=lens.name if lens else "logit lens",
        stream=stream,
        **readings,
        token_ids=np.concatenate(ids),
        document=np.repeat(np.arange(len(ids)), [len(i) for i in ids]),
        position=np.concatenate([start + np.arange(len(i)) for i in ids]),
        strata={name: np.concatenate([s[name] for s in strata]) for name in strata[0]},
        skipped=start * len(ids),
        tokenizer_sha256=hashlib.sha256(model.tokenizer.to_str().encode()).hexdigest(),
        provenance=Provenance(
            {model.identity.name: model.identity.weights_sha256},
            texts_hash(map(as_text, texts)),
            len(texts),
            {
                "lens": lens.name if lens else "logit lens",
                "stream": stream,
                "ngram_order": reference and reference.order,
                **arithmetic.record(),
            },
        ),
    )


def unigram_log_probabilities(
    documents: Iterable[Int64[np.ndarray, " _"] | Sequence[int]], vocab_size: int
) -> Float[np.ndarray, " V"]:
    """Add-one log frequencies of the tokens of some documents."""
    counts = np.ones(vocab_size)
    for ids in documents:
        np.add.at(counts, np.asarray(ids, dtype=np.int64), 1)
    return np.log(counts / counts.sum())
