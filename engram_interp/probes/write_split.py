"""How does the write of a memory divide into the gated value and the convolution?

Y = u + c (paper eq. 5): the squared norms of both parts, their cosine, and how much each tap brings to the convolution's input.
The gate scales u alone, so a large c is a write that a small gate does not stop. Misleads: shares of the convolution's input are
not shares of its output, since SiLU and cancellation between taps come after.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engram_interp.memory.engram import rms_normalise
from engram_interp.models.protocol import MemoryModel


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


def tap_energy(engram, gated) -> torch.Tensor:  # noqa: ANN001
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
class SplitSums:
    """What is kept of one layer while texts stream by."""

    gated: float = 0.0
    conv: float = 0.0
    dot: float = 0.0
    taps: np.ndarray | None = None
    tokens: int = 0

    def add(self, gated: torch.Tensor, conv: torch.Tensor, taps: torch.Tensor) -> None:
        """One text: gated value and convolution [T, M, D], energies of the taps [T, kernel]."""
        self.gated += float(gated.square().sum())
        self.conv += float(conv.square().sum())
        self.dot += float((gated * conv).sum())
        energy = taps.sum(0).double().numpy()
        self.taps = energy if self.taps is None else self.taps + energy
        self.tokens += len(gated)

    def finish(self, layer: int, model: MemoryModel) -> WriteSplit:
        """Means over all tokens."""
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
