"""What do the gates do over a corpus?

Streams texts through the model and keeps, for every Engram layer and branch: a histogram of the gate (hence mean, quantiles,
entropy), the mean in strata of tokens and its text-paired difference from the rest, the mean by how often the n-gram occurs in
a reference corpus, the correlation with the loss of the next token, the strongest contexts, and how the write divides into
gated value and convolution, tap by tap. Memory does not grow with tokens; per text a few numbers are kept for the intervals.

Texts, not tokens, are the units of every interval. Misleads: a gate that prefers frequent n-grams need not help there
(Engram-Nine finds the preference outlives its use); compare with an ablation before calling a gate useful.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64

from engram_interp.gallery import GallerySentence, entity_final_positions
from engram_interp.measure.statistics import Estimate, mean_interval, not_estimable
from engram_interp.memory.engram import rms_normalise
from engram_interp.models.protocol import MemoryModel
from engram_interp.models.text import show_tokens, start_tokens, windows
from engram_interp.probes.gates import _provenance, _require_memory
from engram_interp.runs import Provenance

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

BINS = 1000
COUNT_EDGES = (0, 1, 2, 4, 8, 16, 32)
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class GateSummary:
    """One layer and branch. Gates in (0, 1); entropy of the gate's distribution in nats (at most log 1000)."""

    layer: int
    branch: int
    mean: Estimate
    quantiles: dict[str, float]
    entropy: float
    strata: dict[str, Estimate]
    difference: dict[str, Estimate]
    by_count: dict[str, Estimate]
    loss_correlation: Estimate


@dataclass(frozen=True)
class WriteSplit:
    """How the write Y = u + c of one layer divides: squared norms of the gated value u and the convolution c, their cosine,

    and the share of each tap (source token t - tap * dilation) in the convolution's input energy, current token first.
    """

    layer: int
    gated_norm2: float
    conv_norm2: float
    cosine: float
    tap_offsets: tuple[int, ...]
    tap_shares: tuple[float, ...]


@dataclass(frozen=True)
class Context:
    """A strong activation: where, and what stood before it."""

    layer: int
    branch: int
    gate: float
    text: int
    position: int
    context: str


@dataclass(frozen=True)
class GateStatistics:
    """The gates of a corpus; see the module for what each part means."""

    summaries: tuple[GateSummary, ...]
    splits: tuple[WriteSplit, ...]
    contexts: tuple[Context, ...]
    tokens: int
    texts: int
    provenance: Provenance

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)

    def table(self) -> pd.DataFrame:
        """One row per layer, branch and stratum (`all` first), with the difference from the rest."""
        import pandas as pd

        rows = []
        for s in self.summaries:
            for name, estimate in {
                "all": s.mean,
                **s.strata,
                **{f"count {k}": v for k, v in s.by_count.items()},
            }.items():
                gap = s.difference.get(name)
                rows.append(
                    {
                        "layer": s.layer,
                        "branch": s.branch,
                        "stratum": name,
                        "mean": estimate.value,
                        "low": estimate.low,
                        "high": estimate.high,
                        "minus_rest": gap.value if gap else np.nan,
                        "minus_rest_low": gap.low if gap else np.nan,
                        "minus_rest_high": gap.high if gap else np.nan,
                    }
                )
        return pd.DataFrame(rows)

    def figure(self) -> go.Figure:
        """Mean gate with its interval by stratum, for every layer and branch."""
        from engram_interp.figures.gatemap import gate_strata_figure

        return gate_strata_figure(self.table())


@dataclass
class _Tally:
    """What is kept while texts stream by."""

    histogram: np.ndarray
    per_text: dict[str, list[np.ndarray]] = field(default_factory=dict)
    correlations: list[np.ndarray] = field(default_factory=list)
    strongest: dict[tuple[int, int], list[tuple[float, int, int, str]]] = field(default_factory=dict)
    tokens: int = 0
    texts: int = 0

    def add_stratum(self, name: str, gates: np.ndarray, mask: np.ndarray) -> None:
        shape = gates.shape[1:]
        mean = gates[mask].mean(0) if mask.any() else np.full(shape, np.nan)
        self.per_text.setdefault(name, []).append(mean)


def record_gates(
    model: MemoryModel,
    texts: Sequence[str | GallerySentence],
    *,
    reference: Iterable[str] | None = None,
    top: int = 10,
    progress: bool = False,
) -> GateStatistics:
    """Gate statistics over a corpus; the start token of a text is left out.

    Args: texts: plain texts, or gallery sentences, whose entity-final and phrase-final tokens become strata; reference: texts in
        which to count the longest n-grams (None: no split by count); top: strongest contexts kept per layer and branch.
    Raises: ValueError when there is no text, no memory, or a text is empty.

    >>> import engram_interp
    >>> from engram_interp.gallery import load_gallery
    >>> from engram_interp.probes import record_gates
    >>> statistics = record_gates(engram_interp.load("mini-engram"), load_gallery()[:4])
    >>> statistics.texts
    4
    >>> all(0 < summary.mean.value < 1 for summary in statistics.summaries)
    True
    """
    if not texts:
        raise ValueError("expected at least one text, found none")
    layers = _require_memory(model)
    counts = _count_ngrams(model, layers[0], reference) if reference is not None else None
    branches = model.engram(layers[0]).options.branches  # type: ignore[attr-defined]
    tally = _Tally(np.zeros((len(layers), branches, BINS), dtype=np.int64))
    splits = [_SplitSums() for _ in layers]
    for index, item in enumerate(_progress(texts, progress)):
        text = item.text if isinstance(item, GallerySentence) else item
        reading = _read(model, text, layers)
        _add(tally, reading, index, text, item, model, counts, top)
        for sums, parts in zip(splits, reading.splits, strict=True):
            sums.add(*parts)
    plain = [t.text if isinstance(t, GallerySentence) else t for t in texts]
    return GateStatistics(
        summaries=tuple(_summary(tally, layers, e, m) for e in range(len(layers)) for m in range(branches)),
        splits=tuple(s.finish(layer, model) for s, layer in zip(splits, layers, strict=True)),
        contexts=tuple(
            Context(layers[e], m, gate, text, position, context)
            for (e, m), heap in sorted(tally.strongest.items())
            for gate, text, position, context in sorted(heap, reverse=True)
        ),
        tokens=tally.tokens,
        texts=tally.texts,
        provenance=_provenance(model, plain, {"top": top, "reference": counts is not None, "bins": BINS}),
    )


def _progress(items: Sequence, show: bool) -> Iterable:
    if not show:
        return items
    from tqdm import tqdm

    return tqdm(items, unit="text", desc="gates")


@dataclass(frozen=True, eq=False)
class _Reading:
    """One text without its start token."""

    ids: Int64[np.ndarray, " T"]
    gates: Float[np.ndarray, "T E M"]
    loss: Float[np.ndarray, " T"]
    mixes: Int64[np.ndarray, " T"]
    splits: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def _read(model: MemoryModel, text: str, layers: tuple[int, ...]) -> _Reading:
    skip = len(start_tokens(model))
    parts = []
    for window in windows(model, text):
        keep = slice(max(window.keep.start, skip), window.keep.stop)
        names = [f"blocks.{i}.engram.hook_{n}" for i in layers for n in ("gate", "gated_value")]
        conv = [n for i in layers if (n := f"blocks.{i}.engram.hook_conv_out") in model.hook_dict]
        logits, cache = model.run_with_cache(window.tokens, [*names, *conv])
        parts.append(_window_reading(model, window.tokens, keep, layers, logits, cache))
    ids, gates, loss, mixes = (
        np.concatenate([getattr(p, f) for p in parts]) for f in ("ids", "gates", "loss", "mixes")
    )
    splits = []
    for layer in zip(*(p.splits for p in parts), strict=True):
        gated, conv, energy = (torch.cat(t) for t in zip(*layer, strict=True))
        splits.append((gated, conv, energy))
    return _Reading(ids, gates, loss, mixes, splits)


def _window_reading(model, tokens, keep: slice, layers: tuple[int, ...], logits, cache) -> _Reading:  # noqa: ANN001
    gates = np.stack([cache[f"blocks.{i}.engram.hook_gate"][0, keep].float().numpy() for i in layers], axis=1)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:], reduction="none")
    loss = torch.cat([loss, loss.new_full((1,), torch.nan)])[keep].numpy()
    first = model.engram(layers[0]).ngram_hash
    mixes = first.mix(first.compress(tokens))[0, keep, -1].numpy()
    splits = []
    for i in layers:
        gated = cache[f"blocks.{i}.engram.hook_gated_value"][0].float()
        name = f"blocks.{i}.engram.hook_conv_out"
        conv = cache[name][0, keep].float() if name in cache.cache_dict else torch.zeros_like(gated[keep])
        splits.append((gated[keep], conv, _tap_energy(model.engram(i), gated)[keep]))
    return _Reading(tokens[0, keep].numpy(), gates, loss, mixes, splits)


def _tap_energy(engram, gated) -> torch.Tensor:  # noqa: ANN001
    """Squared norm of what each tap adds to the convolution's input, [T, kernel], current token first."""
    kernel = engram.options.conv_kernel
    if not kernel:
        return gated.new_zeros(len(gated), 1)
    normed = rms_normalise(gated, engram.conv_norm, engram.options.conv_eps)
    history = torch.nn.functional.pad(normed, (0, 0, 0, 0, engram.conv_history, 0))
    taps = [
        (history[j * engram.dilation : j * engram.dilation + len(gated)] * engram.conv[..., j]).square().sum((1, 2))
        for j in reversed(range(kernel))
    ]
    return torch.stack(taps, dim=1)


@dataclass
class _SplitSums:
    gated: float = 0.0
    conv: float = 0.0
    dot: float = 0.0
    taps: np.ndarray | None = None
    tokens: int = 0

    def add(self, gated: torch.Tensor, conv: torch.Tensor, taps: torch.Tensor) -> None:
        self.gated += float(gated.square().sum())
        self.conv += float(conv.square().sum())
        self.dot += float((gated * conv).sum())
        energy = taps.sum(0).double().numpy()
        self.taps = energy if self.taps is None else self.taps + energy
        self.tokens += len(gated)

    def finish(self, layer: int, model: MemoryModel) -> WriteSplit:
        engram = model.engram(layer)
        kernel = engram.options.conv_kernel  # type: ignore[attr-defined]
        assert self.taps is not None
        total = self.taps.sum()
        shares = self.taps / total if total > 0 else np.zeros_like(self.taps)
        norms = np.sqrt(self.gated * self.conv)
        return WriteSplit(
            layer,
            self.gated / self.tokens,
            self.conv / self.tokens,
            float(self.dot / norms) if norms > 0 else 0.0,
            tuple(j * engram.dilation for j in range(kernel)),  # type: ignore[attr-defined]
            tuple(map(float, shares[:kernel])),
        )


def _strata(item: str | GallerySentence, model: MemoryModel, length: int) -> dict[str, Bool[np.ndarray, " T"]]:
    if not isinstance(item, GallerySentence):
        return {}
    offsets = model.tokenizer.encode(item.text, add_special_tokens=False).offsets
    strata = {}
    for name, kind in (("entity-final", "entity"), ("phrase-final", "phrase")):
        mask = np.zeros(length, dtype=bool)
        mask[entity_final_positions(item, offsets, kind)] = True
        strata[name] = mask
    strata["rest"] = ~np.logical_or.reduce(list(strata.values()))
    return strata


def _add(tally, reading: _Reading, index: int, text: str, item, model: MemoryModel, counts, top: int) -> None:  # noqa: ANN001
    gates = reading.gates
    tally.tokens += len(gates)
    tally.texts += 1
    bins = np.minimum((gates * BINS).astype(np.int64), BINS - 1)
    for e in range(gates.shape[1]):
        for m in range(gates.shape[2]):
            tally.histogram[e, m] += np.bincount(bins[:, e, m], minlength=BINS)
    tally.add_stratum("all", gates, np.ones(len(gates), dtype=bool))
    for name, mask in _strata(item, model, len(gates)).items():
        tally.add_stratum(name, gates, mask)
    if counts is not None:
        found = counts.of(reading.mixes)
        for low, high, label in _count_bins():
            tally.add_stratum(f"count {label}", gates, (found >= low) & (found < high))
    tally.correlations.append(_correlation(gates, reading.loss))
    _keep_strongest(tally, reading, index, model, top)


def _count_bins() -> list[tuple[float, float, str]]:
    """First count, first count beyond, label."""
    edges = [*map(float, COUNT_EDGES), math.inf]
    return [(low, high, _count_label(low, high)) for low, high in pairwise(edges)]


def _count_label(low: float, high: float) -> str:
    if high == math.inf:
        return f"{low:.0f}+"
    return f"{low:.0f}" if high == low + 1 else f"{low:.0f}-{high - 1:.0f}"


def _correlation(gates: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Pearson correlation of gate and next-token loss within one text, NaN below 8 tokens or without variance."""
    known = np.isfinite(loss)
    if known.sum() < 8:
        return np.full(gates.shape[1:], np.nan)
    g = gates[known].astype(np.float64)
    g -= g.mean(0)
    x = loss[known].astype(np.float64) - loss[known].mean()
    scale = np.sqrt((g**2).sum(0) * (x**2).sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, np.einsum("tem,t->em", g, x) / scale, np.nan)


def _keep_strongest(tally: _Tally, reading: _Reading, index: int, model: MemoryModel, top: int) -> None:
    for e in range(reading.gates.shape[1]):
        for m in range(reading.gates.shape[2]):
            column, heap = reading.gates[:, e, m], tally.strongest.setdefault((e, m), [])
            for position in np.argsort(-column)[:top]:
                gate = float(column[position])
                if len(heap) == top and gate <= heap[0][0]:
                    break
                context = "".join(
                    show_tokens(model.tokenizer, reading.ids[max(0, position - 8) : position + 1].tolist())
                )
                entry = (gate, index, int(position), context)
                heapq.heappush(heap, entry) if len(heap) < top else heapq.heapreplace(heap, entry)


def _summary(tally: _Tally, layers: tuple[int, ...], e: int, m: int) -> GateSummary:
    columns = {name: np.array([mean[e, m] for mean in means]) for name, means in tally.per_text.items()}
    counts = {k.removeprefix("count "): _mean(v) for k, v in columns.items() if k.startswith("count ")}
    strata = {k: _mean(v) for k, v in columns.items() if k != "all" and not k.startswith("count ")}
    difference = {k: _mean(columns[k] - columns["rest"]) for k in strata if k != "rest"}
    share = tally.histogram[e, m] / tally.histogram[e, m].sum()
    used = share[share > 0]
    cumulative = np.cumsum(share)
    return GateSummary(
        layer=layers[e],
        branch=m,
        mean=_mean(columns["all"]),
        quantiles={f"{q:g}": float((np.searchsorted(cumulative, q) + 0.5) / BINS) for q in _QUANTILES},
        entropy=float(-(used * np.log(used)).sum()),
        strata=strata,
        difference=difference,
        by_count=counts,
        loss_correlation=_mean(np.array([c[e, m] for c in tally.correlations])),
    )


def _mean(values: Float[np.ndarray, " texts"]) -> Estimate:
    """Mean over the texts that have the stratum; each text counts once."""
    known = values[np.isfinite(values)].astype(np.float64)
    if len(known) < 2:
        return not_estimable("fewer than 2 texts", len(known))
    return mean_interval(known)


@dataclass(frozen=True, eq=False)
class _NgramCounts:
    """How often each n-gram of the longest order occurs, keyed by its 63-bit mix."""

    keys: Int64[np.ndarray, " n"]
    counts: Int64[np.ndarray, " n"]

    def of(self, mixes: Int64[np.ndarray, " T"]) -> Int64[np.ndarray, " T"]:
        """Count of each mix, 0 when unseen."""
        if not len(self.keys):
            return np.zeros(len(mixes), dtype=np.int64)
        at = np.searchsorted(self.keys, mixes).clip(max=len(self.keys) - 1)
        return np.where(self.keys[at] == mixes, self.counts[at], 0)


def _count_ngrams(model: MemoryModel, layer: int, reference: Iterable[str]) -> _NgramCounts:
    ngram_hash = model.engram(layer).ngram_hash  # type: ignore[attr-defined]
    mixes = []
    for text in reference:
        ids = [*start_tokens(model), *model.tokenizer.encode(text, add_special_tokens=False).ids]
        mixes.append(ngram_hash.mix(ngram_hash.compress(torch.tensor([ids])))[0, :, -1].numpy())
    return _NgramCounts(*np.unique(np.concatenate(mixes or [np.zeros(0, dtype=np.int64)]), return_counts=True))
