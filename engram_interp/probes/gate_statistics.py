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
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int64

from engram_interp.gallery import GallerySentence
from engram_interp.measure.statistics import Estimate, mean_interval, not_estimable
from engram_interp.memory.ngram_counts import NgramTable, count_ngrams
from engram_interp.models.protocol import MemoryModel
from engram_interp.models.text import show_tokens, start_tokens, windows
from engram_interp.probes.gates import _provenance, _require_memory
from engram_interp.probes.strata import as_text, count_bins, span_final
from engram_interp.probes.write_split import SplitSums, WriteSplit, tap_energy
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
    splits = [SplitSums() for _ in layers]
    for index, item in enumerate(_progress(texts, progress)):
        reading = _read(model, as_text(item), layers)
        _add(tally, reading, index, item, model, counts, top)
        for sums, parts in zip(splits, reading.splits, strict=True):
            sums.add(*parts)
    plain = [as_text(item) for item in texts]
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
        splits.append((gated[keep], conv, tap_energy(model.engram(i), gated)[keep]))
    return _Reading(tokens[0, keep].numpy(), gates, loss, mixes, splits)


def _add(
    tally: _Tally,
    reading: _Reading,
    index: int,
    item: str | GallerySentence,
    model: MemoryModel,
    counts: NgramTable | None,
    top: int,
) -> None:
    gates = reading.gates
    tally.tokens += len(gates)
    tally.texts += 1
    bins = np.minimum((gates * BINS).astype(np.int64), BINS - 1)
    for e in range(gates.shape[1]):
        for m in range(gates.shape[2]):
            tally.histogram[e, m] += np.bincount(bins[:, e, m], minlength=BINS)
    tally.add_stratum("all", gates, np.ones(len(gates), dtype=bool))
    if isinstance(item, GallerySentence):
        entity, phrase = (span_final(model.tokenizer, item, kind) for kind in ("entity", "phrase"))
        for name, mask in (("entity-final", entity), ("phrase-final", phrase), ("rest", ~(entity | phrase))):
            tally.add_stratum(name, gates, mask)
    if counts is not None:
        for label, mask in count_bins(counts.count_of(reading.mixes), COUNT_EDGES).items():
            tally.add_stratum(f"count {label}", gates, mask)
    tally.correlations.append(_correlation(gates, reading.loss))
    _keep_strongest(tally, reading, index, model, top)


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


def _count_ngrams(model: MemoryModel, layer: int, reference: Iterable[str]) -> NgramTable:
    """The n-grams of the longest order, which lie in the last table."""
    ngram_hash = model.engram(layer).ngram_hash  # type: ignore[attr-defined]
    start = start_tokens(model)
    ids = (np.array([*start, *model.tokenizer.encode(t, add_special_tokens=False).ids]) for t in reference)
    return count_ngrams(ngram_hash, ids).tables[-1]
