"""What if the memory wrote something else, or only one of its two paths?

Y = u + SiLU(Conv(RMSNorm(u))) is what a memory adds to the streams. These kinds replace Y, or keep one path of it. The
conv path sees normalised values and so is not scaled by the gate: attribution must split the paths.
"""

from __future__ import annotations

import torch
from transformer_lens.hook_points import HookPoint

from engram_interp.hooks.donors import choose_donors
from engram_interp.hooks.site import AblationError, Hook, Kind, Site, capture, check_choice
from engram_interp.hooks.statistics import MemoryStatistics
from engram_interp.shapes import Float, Tensor

_DIRECTIONS = 512  # fixed random directions to choose from; enough that few positions of a text share one


def replace_write(site: Site, constant: Float[Tensor, "M D"] | None) -> list[Hook]:
    """Y becomes one constant (None: zero)."""

    def write(value: Tensor, hook: HookPoint) -> Tensor:
        new = value.new_zeros(()) if constant is None else constant.to(value.device)
        return site.put(value, new, branched=True)

    return [(site.write, write)]


def output_zero(site: Site) -> list[Hook]:
    """Y = 0."""
    return replace_write(site, None)


def branches(site: Site) -> list[Hook]:
    """Y = 0 for the chosen branches, which must be given."""
    if site.branches is None:
        raise AblationError("kind 'branches' expects branches=[...], found none")
    check_choice("branches", site.branches, range(max(site.branches) + 1))
    return replace_write(site, None)


def mean(site: Site, *, statistics: MemoryStatistics) -> list[Hook]:
    """Y = its mean over the fitted texts."""
    return replace_write(site, statistics.blocks[site.block].write_mean)


def optimal(site: Site, *, statistics: MemoryStatistics) -> list[Hook]:
    """Y = the constant that hurts least (Li & Janson 2024)."""
    constant = statistics.blocks[site.block].optimal
    if constant is None:
        raise AblationError(
            f"block {site.block}: no fitted constant; call fit_optimal_constants on these statistics first"
        )
    return replace_write(site, constant)


def resample(site: Site, *, statistics: MemoryStatistics, seed: int = 0) -> list[Hook]:
    """Y = the write at a position of another document."""
    donors, seen = statistics.blocks[site.block].donors, {}

    def write(value: Tensor, hook: HookPoint) -> Tensor:
        chosen = choose_donors(seen.pop("slots"), len(donors), seed)
        return site.put(value, donors.to(value.device)[chosen], branched=True)

    return [(site.inside("slots"), capture(seen, "slots")), (site.write, write)]


def random_directions(block: int, branches: int, width: int, seed: int) -> Float[Tensor, "directions M D"]:
    """The bank of `equal_norm_random`: unit vectors per branch, the same for a seed and block on every machine's CPU."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + block)
    bank = torch.randn(_DIRECTIONS, branches, width, generator=generator)
    return bank / bank.norm(dim=-1, keepdim=True)


def equal_norm_random(site: Site, *, seed: int = 0) -> list[Hook]:
    """Y = a random direction with the norm Y had, branch by branch.

    `seed` draws both the bank of directions (`random_directions`) and which position takes which (`choose_donors`).
    """
    seen: dict[str, Tensor] = {}

    def write(value: Tensor, hook: HookPoint) -> Tensor:
        bank = random_directions(site.block, value.shape[2], value.shape[3], seed).to(value)
        direction = bank[choose_donors(seen.pop("slots"), _DIRECTIONS, seed)]
        return site.put(value, direction * value.norm(dim=-1, keepdim=True), branched=True)

    return [(site.inside("slots"), capture(seen, "slots")), (site.write, write)]


def conv_off(site: Site) -> list[Hook]:
    """Y = u: the gated value alone."""
    _require_conv(site)
    return [(site.inside("conv_out"), lambda value, hook: site.put(value, value.new_zeros(()), branched=True))]


def gated_off(site: Site) -> list[Hook]:
    """Y = the conv path alone, computed from the unchanged gated value."""
    _require_conv(site)
    seen: dict[str, Tensor] = {}

    def write(value: Tensor, hook: HookPoint) -> Tensor:
        return site.put(value, seen.pop("conv"), branched=True)

    return [(site.inside("conv_out"), capture(seen, "conv")), (site.write, write)]


def _require_conv(site: Site) -> None:
    options = getattr(site.memory, "options", None)
    if not site.has(site.inside("conv_out")) or (options is not None and not options.conv_kernel):
        raise AblationError(f"block {site.block}: this memory has no convolution")


KINDS = (
    Kind(
        "output_zero",
        output_zero,
        "off (the paper's stress test)",
        "total necessity, plus the shock of a missing write",
    ),
    Kind("branches", branches, "off", "which residual stream needs the memory"),
    Kind("mean", mean, "mean on, joint off", "information in the write, apart from its offset", ("statistics",)),
    Kind("optimal", optimal, "joint off, least harm", "lower bound of the information lost", ("statistics",)),
    Kind(
        "resample",
        resample,
        "marginal on, joint off: misinforms",
        "upper bound of harm by wrong content",
        ("statistics",),
    ),
    Kind(
        "equal_norm_random",
        equal_norm_random,
        "off",
        "is it the direction of the write, or only its size",
        control=True,
    ),
    Kind("conv_off", conv_off, "off", "what the convolution path carries"),
    Kind("gated_off", gated_off, "off", "what the directly gated value carries"),
)
