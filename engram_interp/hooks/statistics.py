"""What does the memory usually write, gate and read?

Fitted once on texts that are not evaluated, then frozen: the constants that mean, gate-mean and order ablations put in
place of the memory, donors for resampling, how often each row is read, and how large the write is beside attention,
experts and MLP. Cost: one forward per text, plus a few on the first text. The start token is excluded. Misleads when
the texts are unlike the evaluated ones (the mean is then off distribution), or are the evaluated ones (a donor may be
the item's own document).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformer_lens import ActivationCache

from engram_interp.hooks.site import Site
from engram_interp.models.protocol import MemoryModel
from engram_interp.models.text import start_tokens, windows
from engram_interp.runs import Provenance, texts_hash
from engram_interp.shapes import Float, Int64, Tensor


@dataclass(frozen=True, eq=False)
class BlockStatistics:
    """What one memory does on average. Norms are over all branches together, in residual units.

    `donors` are writes sampled evenly over the texts; `use` counts reads of each row; `attn_gain` and `mlp_gain`
    convert the norm of those outputs to the norm of the change of the streams (NaN where the model has no such hook
    points); `expert_sizes[j]` is the mean change of the streams when the j+1 most probable experts of each token are
    silenced.
    """

    write_mean: Float[Tensor, "streams D"]
    write_norm: float
    gate_mean: Float[Tensor, " M"]
    embedding_mean: Float[Tensor, " mem"]
    donors: Float[Tensor, "R streams D"]
    use: Int64[Tensor, " rows"] | None
    attn_gain: float
    mlp_gain: float
    expert_sizes: tuple[float, ...]
    optimal: Float[Tensor, "streams D"] | None = None


@dataclass(frozen=True, eq=False)
class MemoryStatistics:
    """Statistics of every memory of a model, by block, and where they came from."""

    blocks: Mapping[int, BlockStatistics]
    positions: int
    provenance: Provenance = field(repr=False)


class _Sums:
    """Running sums of one block."""

    def __init__(self, rows: int | None) -> None:
        self.count = 0
        self.write: Tensor = torch.zeros(())
        self.gate: Tensor = torch.zeros(())
        self.embedding: Tensor = torch.zeros(())
        self.norm = 0.0
        self.donors: list[Tensor] = []
        self.use = None if rows is None else torch.zeros(rows, dtype=torch.int64)

    def add(self, cache: ActivationCache, site: Site, keep: slice, rng: np.random.Generator, donors: int) -> None:
        """Take in one window."""
        write = cache[site.write][0, keep].float()
        self.count += len(write)
        self.norm += float(write.double().flatten(1).norm(dim=1).sum())
        self.write = self.write + write.double().sum(0)
        self.gate = self.gate + cache[site.inside("gate")][0, keep].double().sum(0)
        self.embedding = self.embedding + cache[site.inside("embedding")][0, keep].double().sum(0)
        chosen = rng.choice(len(write), size=min(donors, len(write)), replace=False)
        self.donors.append(write[torch.from_numpy(np.sort(chosen))].clone())
        if self.use is not None:
            slots = cache[site.inside("slots")][0, keep]
            rows = site.memory.ngram_hash.rows_of_slots(slots)  # type: ignore[attr-defined]
            self.use += torch.bincount(rows.flatten().cpu(), minlength=len(self.use))


def collect_memory_statistics(
    model: MemoryModel, texts: Sequence[str], *, donors: int = 512, seed: int = 0
) -> MemoryStatistics:
    """Fit the statistics that data-dependent ablations need.

    Args: texts: documents that will not be evaluated; donors: writes kept per block for resampling, about equally many
        from each text; seed: which positions become donors.
    Raises: ValueError for a model without a memory, no texts, or an empty text.
    """
    if not model.engram_layers:
        raise ValueError(f"expected a model with a memory, found {model.identity.name!r} without one")
    if not texts:
        raise ValueError("expected at least one text to fit statistics on, found none")
    rng = np.random.default_rng(seed)
    sites = [Site(model, block) for block in model.engram_layers]
    sums = {site.block: _Sums(_table_rows(site)) for site in sites}
    names = [name for s in sites for name in (s.write, *(s.inside(p) for p in ("slots", "embedding", "gate")))]
    first = len(start_tokens(model))
    pieces = [window for text in texts for window in windows(model, text)]
    per_window = -(-donors // len(pieces))
    with torch.no_grad():
        for window in pieces:
            _, cache = model.run_with_cache(window.tokens, names)
            keep = slice(max(first, window.keep.start), None)
            for site in sites:
                sums[site.block].add(cache, site, keep, rng, per_window)
        blocks = {site.block: _finish(site, sums[site.block], pieces[0].tokens, donors) for site in sites}
    count = sums[sites[0].block].count
    options = {"donors": donors, "seed": seed, "positions": count}
    provenance = Provenance(
        {model.identity.name: model.identity.weights_sha256}, texts_hash(texts), len(texts), options
    )
    return MemoryStatistics(blocks, count, provenance)


def _table_rows(site: Site) -> int | None:
    module = site.model.engram(site.block)  # type: ignore[attr-defined]
    return module.ngram_hash.rows if hasattr(module, "ngram_hash") else None


def _finish(site: Site, sums: _Sums, tokens: Tensor, donors: int) -> BlockStatistics:
    n = sums.count
    return BlockStatistics(
        write_mean=(sums.write / n).float(),
        write_norm=sums.norm / n,
        gate_mean=(sums.gate / n).float(),
        embedding_mean=(sums.embedding / n).float(),
        donors=torch.cat(sums.donors)[:donors],
        use=sums.use,
        attn_gain=_gain(site, tokens, "hook_attn_out", "hook_resid_mid"),
        mlp_gain=_gain(site, tokens, "hook_mlp_out", "hook_resid_post"),
        expert_sizes=_expert_sizes(site, tokens),
    )


def _change(site: Site, tokens: Tensor, lesion: tuple, watched: str) -> Tensor:
    """|change of the streams| at every position when one hook is changed."""
    _, base = site.model.run_with_cache(tokens, [watched])
    with site.model.hooks([lesion]):
        _, after = site.model.run_with_cache(tokens, [watched])
    return (after[watched] - base[watched]).flatten(2).norm(dim=2)


def _gain(site: Site, tokens: Tensor, output: str, after: str) -> float:
    """Norm of the streams' change per unit of a sublayer's output, measured by silencing it once."""
    output, after = f"blocks.{site.block}.{output}", f"blocks.{site.block}.{after}"
    if not (site.has(output) and site.has(after)):
        return float("nan")
    change = _change(site, tokens, (output, lambda value, hook: torch.zeros_like(value)), after)
    _, cache = site.model.run_with_cache(tokens, [output])
    norms = cache[output].flatten(2).norm(dim=2)
    return float(change.sum() / norms.sum()) if float(norms.sum()) else float("nan")


def _expert_sizes(site: Site, tokens: Tensor) -> tuple[float, ...]:
    weights, after = f"blocks.{site.block}.mlp.hook_expert_weights", f"blocks.{site.block}.hook_resid_post"
    if not (site.has(weights) and site.has(after)):
        return ()
    _, cache = site.model.run_with_cache(tokens, [weights])
    sizes = []
    for count in range(1, cache[weights].shape[-1] + 1):
        keep = torch.arange(cache[weights].shape[-1]) >= count
        lesion = (weights, lambda value, hook, keep=keep: value * keep.to(value))
        sizes.append(float(_change(site, tokens, lesion, after).mean()))
    return tuple(sizes)
