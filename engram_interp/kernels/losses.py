"""What does each token cost, without holding [T, V] logits of a long text?"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engram_interp.shapes import Float, Int64, Tensor

_ROWS = 256


def token_losses(
    hidden: Float[Tensor, "T D"], unembed: Callable[[Tensor], Tensor], targets: Int64[Tensor, " T"]
) -> Float[Tensor, " T"]:
    """Cross-entropy in nats of every target, `_ROWS` positions at a time, in float32.

    Args: hidden: vectors ready for the unembedding.
    """
    parts = [
        torch.nn.functional.cross_entropy(unembed(h).float(), y, reduction="none")
        for h, y in zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True)
    ]
    return torch.cat(parts)
