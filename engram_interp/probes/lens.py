"""When does the final prediction form?

Logit lens: every residual site (the embedding output first) is decoded by the model's own exit path and compared with
the final prediction; KL(final || site) in nats is what leaving the model there would lose (Belrose et al. 2023, eq. 3).
The last site is the final prediction, so its KL is exactly 0. Reverse KL, Jensen-Shannon, entropy, top-1, cross-entropy
to the true token and the settling depth (first site from which the top-1 never changes) come from the same pass.

With `quantities="kl"` only KL, cross-entropy and top-1 are formed, which costs little more than the products with the
unembedding (`engram_interp.kernels.lens_kl`); the others are NaN then.

Cost: one forward and L + 1 unembeddings; memory: a few hundred tokens' residuals and one chunk of logits at a time,
plus 28 bytes per token and site for the result. Start tokens are excluded and counted. Misleads: intermediate sites
need not speak the final basis, so a lower KL can be a matter of dialect: read it beside a tuned lens
(`engram_interp.probes.tuned_lens`), and compare models only by `compare_lens`, with seeds as the unit wherever there is
more than one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64

from engram_interp.gallery import GallerySentence
from engram_interp.kernels.lens import LensError, LensReadings, lens_readings
from engram_interp.kernels.lens_kl import lens_kl, plain_head
from engram_interp.measure.statistics import Band, simultaneous_band
from engram_interp.models.protocol import Decoder
from engram_interp.models.text import Window, start_tokens, windows
from engram_interp.probes.strata import NgramCounts, as_text, text_strata
from engram_interp.runs import Provenance, texts_hash
from engram_interp.shapes import Float as TensorFloat
from engram_interp.shapes import Tensor

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
_BATCH = 256  # tokens collected before the unembeddings, so that short texts share them


@runtime_checkable
class Lens(Protocol):
    """What turns a site's residual into one the exit path can read; the plain logit lens leaves it alone."""

    @property
    def name(self) -> str:
        """Printed with every result."""
        ...

    def check(self, model: Decoder) -> None:
        """Raise ValueError when the lens was not made for this model."""
        ...

    def translate(self, site: int, hidden: TensorFloat[Tensor, "B T M D"]) -> TensorFloat[Tensor, "B T M D"]:
        """The residual in the final basis."""
        ...


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
    def agreement(self) -> Bool[np.ndarray, "L N"]:
        """Whether a site's top-1 is the final one."""
        return self.top1 == self.final_top1

    @property
    def settling_depth(self) -> Int64[np.ndarray, " N"]:
        """First site from which the top-1 is the final one to the end; `sites` if there is none (single streams)."""
        settled = np.logical_and.accumulate(self.agreement[::-1], axis=0)
        return self.sites - settled.sum(0)

    def values(self, quantity: str = "kl") -> Float[np.ndarray, "L N"]:
        """A quantity by name.

        Raises: ValueError listing the names.
        """
        if quantity not in QUANTITIES:
            raise ValueError(f"unknown quantity {quantity!r}: expected one of {', '.join(QUANTITIES)}")
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
    quantities: Literal["all", "kl"] = "all",
) -> LensResult:
    """Read every site of a model at every token of some texts.

    Args: texts: plain, or marked with entities (each is one document); lens: a tuned lens, None is the logit lens;
        stream: read this residual stream alone (repeated, so that the model's own exit applies) against the final
        prediction of all; reference: n-gram counts for frequency strata; unigram: log-probabilities of the vocabulary
        against which the final prediction is measured, by default the add-one counts of these texts;
        quantities: "kl" leaves reverse KL, Jensen-Shannon, entropy and the distance to the unigram at NaN.
    Raises: LensError (a ValueError) for no texts, an empty text, a stream the model has not, logits below float32, or a
        residual that is not finite (layer, position and text named).

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
    cuts = [_cut(model, as_text(item), number) for number, item in enumerate(texts)]
    start = len(start_tokens(model))
    ids = [_kept_ids(windows_, start) for windows_ in cuts]
    if unigram is None:
        unigram = unigram_log_probabilities(ids, model.vocab_size)
    pieces = _pieces(model, cuts, ids, start, lens, stream)
    head = plain_head(model, model.unembed) if quantities == "kl" else None
    arithmetic = _Arithmetic(model, torch.from_numpy(np.asarray(unigram)).float(), head)
    readings = _read(arithmetic, pieces)
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
                "quantities": quantities,
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


def _cut(model: Decoder, text: str, number: int) -> list[Window]:
    try:
        return list(windows(model, text))
    except ValueError as error:
        raise LensError(f"text {number}: {error}") from None


def _kept_ids(cut: Sequence[Window], start: int) -> Int64[np.ndarray, " T"]:
    """The text's own token ids, each once, without the start token."""
    return torch.cat([w.tokens[0, max(w.keep.start, start) : w.keep.stop] for w in cut]).numpy()


@dataclass(frozen=True)
class _Piece:
    """Exit-ready vectors of the tokens one window adds."""

    sites: Tensor  # [L, n, D]
    final: Tensor  # [n, D]
    targets: Tensor  # [n]


def _pieces(
    model: Decoder, cuts: list[list[Window]], ids: list[np.ndarray], start: int, lens: Lens | None, stream: int | None
) -> Iterator[_Piece]:
    for number, (cut, text_ids) in enumerate(zip(cuts, ids, strict=True)):
        targets = torch.from_numpy(np.append(text_ids[1:], -1))
        done = 0
        for window in cut:
            keep = slice(max(window.keep.start, start), window.keep.stop)
            sites, final = _exit_vectors(model, window.tokens, keep, lens, stream, number)
            yield _Piece(sites, final, targets[done : done + len(final)])
            done += len(final)


@torch.no_grad()
def _exit_vectors(
    model: Decoder, tokens: Tensor, keep: slice, lens: Lens | None, stream: int | None, text: int
) -> tuple[Tensor, Tensor]:
    with model.lock:
        residuals = [site[:, keep] for site in model.residuals(tokens)]
    _require_finite(residuals, text, keep.start)
    final = model.exit_hidden(residuals[-1])[0]
    vectors = []
    for site, hidden in enumerate(residuals):
        streams = hidden.shape[2]
        if stream is not None:
            if not 0 <= stream < streams:
                raise LensError(f"expected a stream in [0, {streams}), found {stream}")
            hidden = hidden[:, :, stream : stream + 1].expand(-1, -1, streams, -1)
        if lens is not None and site < len(residuals) - 1:
            hidden = lens.translate(site, hidden)
        vectors.append(final if site == len(residuals) - 1 and stream is None else model.exit_hidden(hidden)[0])
    return torch.stack(vectors), final


def _require_finite(residuals: list[Tensor], text: int, offset: int) -> None:
    for site, hidden in enumerate(residuals):
        finite = torch.isfinite(hidden).all(-1).all(-1)[0]
        if not bool(finite.all()):
            position = offset + int(torch.nonzero(~finite)[0])
            where = "the embedding output" if site == 0 else f"the output of block {site - 1}"
            raise LensError(f"{where} (layer {site}) is not finite at position {position} of text {text}")


@dataclass
class _Arithmetic:
    """How readings are formed: by the identity where `head` is a plain matrix, else from all logits of a chunk."""

    model: Decoder
    unigram: Tensor
    head: Tensor | None
    path: str = "all logits of a chunk, float32"
    error: float | None = None  # largest deviation from float64 on sampled tokens, nats

    @property
    def batch(self) -> int:
        """Tokens to collect before a call, so that short texts share the passes over the vocabulary."""
        return _BATCH if self.head is None else 4 * _BATCH

    def __call__(self, sites: Tensor, final: Tensor, targets: Tensor) -> LensReadings:
        if self.head is None:
            return lens_readings(sites, final, self.model.unembed, targets, unigram=self.unigram)
        found = lens_kl(sites, final, self.head, targets, top1=True)
        self.path, self.error = found.choice.description, max(found.error, self.error or 0.0)
        missing = torch.full_like(found.kl, torch.nan)
        cross_entropy, top1 = found.cross_entropy, found.top1
        return LensReadings(found.kl, missing, missing, missing, cross_entropy, top1, found.final_top1, missing[0])

    def record(self) -> dict[str, object]:
        return {"arithmetic": self.path, "kl_error": self.error}


def _read(arithmetic: _Arithmetic, pieces: Iterator[_Piece]) -> dict[str, np.ndarray]:
    """Readings of all pieces, several at a time."""
    results: list[LensReadings] = []
    pending: list[_Piece] = []

    def flush() -> None:
        sites, final = torch.cat([p.sites for p in pending], 1), torch.cat([p.final for p in pending])
        results.append(arithmetic(sites, final, torch.cat([p.targets for p in pending])))
        pending.clear()

    for piece in pieces:
        pending.append(piece)
        if sum(len(p.final) for p in pending) >= arithmetic.batch:
            flush()
    if pending:
        flush()
    return {f.name: torch.cat([getattr(r, f.name) for r in results], -1).numpy() for f in fields(LensReadings)}
