"""What does a row hold, and how is it read?

Paper eq. 2: one flat table for all orders and heads of a layer; the S rows a position addresses are concatenated,
order-major, into its memory vector e_t of width `S * head`.
"""

from __future__ import annotations

import torch
from torch import nn

from engram_interp.shapes import Float, Int64, Tensor


class MultiHeadTable(nn.Module):
    """The rows of one Engram layer, [rows, head]."""

    def __init__(self, rows: int, head_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, head_width))

    def forward(self, rows: Int64[Tensor, "B T S"]) -> Float[Tensor, "B T mem"]:
        """Read and concatenate: e_t."""
        return nn.functional.embedding(rows, self.weight).flatten(-2)
