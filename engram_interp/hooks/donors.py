"""Which stand-in does a position get?

Resampling and random directions need a choice per position that is random in its content, the same in every batch and
every run, and different between seeds: a 63-bit hash of the position's own slots, its place in the text, and the seed.
"""

from __future__ import annotations

import numpy as np
import torch

from engram_interp.shapes import Int64, Tensor

_MASK63 = 2**63 - 1


def choose_donors(slots: Int64[Tensor, "B T S"], count: int, seed: int) -> Int64[Tensor, "B T"]:
    """A donor in [0, count) for every position; the same slots at the same place always choose the same donor."""
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, 2**62, size=slots.shape[-1] + 2, dtype=np.int64) * 2 + 1
    factors = torch.from_numpy(draws).to(slots.device)  # odd, so multiplication modulo 2^64 loses nothing
    place = torch.arange(slots.shape[1], device=slots.device)
    key = (slots * factors[2:]).sum(-1) + place * factors[0]
    key = (key ^ ((key & _MASK63) >> 31)) * factors[1]
    return ((key ^ ((key & _MASK63) >> 29)) & _MASK63) % count
