"""What does the gate decide?

The gate scales the value of each branch; the convolution sees RMSNorm of the gated value, so a small gate leaves most
of the conv path (a tenth of the gate leaves about three quarters of its norm) and only gate = 0 removes it. Effects
against the gate's scale are therefore not continuous at 0.
"""

from __future__ import annotations

import math

from engram_interp.hooks.site import AblationError, Hook, Kind, Site
from engram_interp.hooks.statistics import MemoryStatistics
from engram_interp.shapes import Tensor


def _constant_gate(site: Site, value: float | Tensor) -> list[Hook]:
    def gate(old: Tensor, hook: object) -> Tensor:
        new = value.to(old.device) if isinstance(value, Tensor) else old.new_tensor(value)
        return site.put(old, new, branched=True)

    return [(site.inside("gate"), gate)]


def gate_closed(site: Site) -> list[Hook]:
    """Gate = 0."""
    return _constant_gate(site, 0.0)


def gate_open(site: Site) -> list[Hook]:
    """Gate = 1."""
    return _constant_gate(site, 1.0)


def gate_mean(site: Site, *, statistics: MemoryStatistics) -> list[Hook]:
    """Gate = the mean of its branch over the fitted texts."""
    return _constant_gate(site, statistics.blocks[site.block].gate_mean)


def gate_scale(site: Site, *, scale: float) -> list[Hook]:
    """Gate times `scale`; 1 changes no bit."""
    if not (math.isfinite(scale) and scale >= 0):
        raise AblationError(f"expected a finite scale >= 0, found {scale}")
    return [(site.inside("gate"), lambda old, hook: site.put(old, old * scale, branched=True))]


KINDS = (
    Kind("gate_closed", gate_closed, "edge", "as output_zero: both paths vanish (equal when there are no biases)"),
    Kind("gate_scale", gate_scale, "off", "dose response of the gated value; the conv path hardly follows"),
    Kind("gate_open", gate_open, "edge", "is the gate selective"),
    Kind("gate_mean", gate_mean, "marginally on", "value of the variation of the gate", ("statistics",)),
)
