"""Would any lesion of that size do the same?

Controls damage another part of the same block. `match=True` takes away as much as the memory writes: at every position
the streams change by a vector of the norm of Y along the component's own write (past zero where Y is the larger of the
two); `match=False` silences the component. Experts cannot be scaled apart, so `expert_zero` silences as many of each
token's most probable experts as come closest to the memory's mean write.
"""

from __future__ import annotations

import math

import torch
from transformer_lens.hook_points import HookPoint

from engram_interp.hooks.site import AblationError, Hook, Kind, Site, capture
from engram_interp.hooks.statistics import BlockStatistics, MemoryStatistics
from engram_interp.shapes import Tensor


def attn_zero(site: Site, *, match: bool = True, statistics: MemoryStatistics | None = None) -> list[Hook]:
    """The attention of the block, silenced or reduced by the size of the write."""
    return _component(site, "attn", match, statistics)


def mlp_zero(site: Site, *, match: bool = True, statistics: MemoryStatistics | None = None) -> list[Hook]:
    """The experts of the block together, silenced or reduced by the size of the write."""
    return _component(site, "mlp", match, statistics)


def _component(site: Site, part: str, match: bool, statistics: MemoryStatistics | None) -> list[Hook]:
    name = f"blocks.{site.block}.hook_{part}_out"
    if not site.has(name):
        raise AblationError(f"expected a model with the hook point {name}, found none")
    if not match:
        return [(name, lambda old, hook: site.put(old, old.new_zeros(()), branched=False))]
    fitted = _matched_block(site, statistics)
    gain = fitted.attn_gain if part == "attn" else fitted.mlp_gain
    if not math.isfinite(gain):
        raise AblationError(f"block {site.block}: the size of the {part} write could not be measured; use match=False")
    seen: dict[str, Tensor] = {}

    def reduce(old: Tensor, hook: HookPoint) -> Tensor:
        size = seen.pop("write").flatten(2).norm(dim=2).unsqueeze(-1)
        norm = old.norm(dim=-1, keepdim=True) * gain
        return site.put(old, old * (1 - size / norm.clamp_min(torch.finfo(old.dtype).tiny)), branched=False)

    return [(site.write, capture(seen, "write")), (name, reduce)]


def expert_zero(site: Site, *, experts: int | None = None, statistics: MemoryStatistics | None = None) -> list[Hook]:
    """The most probable routed experts of every token silenced: `experts` of them, or as many as match Y."""
    name = f"blocks.{site.block}.mlp.hook_expert_weights"
    if not site.has(name):
        raise AblationError(f"expected a mixture of experts with the hook point {name}, found none")
    if experts is None:
        fitted = _matched_block(site, statistics)
        if not fitted.expert_sizes:
            raise AblationError(f"block {site.block}: no expert sizes were measured; give experts=")
        gaps = [abs(size - fitted.write_norm) for size in fitted.expert_sizes]
        experts = 1 + gaps.index(min(gaps))

    def silence(old: Tensor, hook: HookPoint) -> Tensor:
        if not 1 <= experts <= old.shape[-1]:
            raise AblationError(f"expected experts in [1, {old.shape[-1]}], found {experts}")
        gone = torch.arange(old.shape[-1], device=old.device) < experts
        return site.put(old, old.masked_fill(gone, 0.0), branched=False)

    return [(name, silence)]


def _matched_block(site: Site, statistics: MemoryStatistics | None) -> BlockStatistics:
    if statistics is None or site.block not in statistics.blocks:
        raise AblationError(
            f"block {site.block}: matching the size of the write needs statistics of a memory in that block, found none"
        )
    return statistics.blocks[site.block]


KINDS = (
    Kind("attn_zero", attn_zero, "off", "scale of a generic lesion of the same block", branched=False, control=True),
    Kind("mlp_zero", mlp_zero, "off", "scale of a generic lesion of the same block", branched=False, control=True),
    Kind(
        "expert_zero",
        expert_zero,
        "off",
        "scale of a lesion of the experts, the other sparse memory",
        branched=False,
        control=True,
    ),
)
