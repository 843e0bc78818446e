"""What does a row hold, and how is it read?

Paper eq. 2: one flat table for all orders and heads of a layer; the S rows a position addresses are concatenated,
order-major, into its memory vector e_t of width `S * head`.

Reading is a copy of rows, and on a CPU most of its time is not the copy: torch's `embedding` takes a fresh output from
the system page by page, and moves narrow rows slowly. `gather_rows` asks numpy for the output (huge pages) and lets it
move narrow rows; the values are the same bits. CUDA in one launch with the hash: `engram_interp.kernels.triton_ngram`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from engram_interp.shapes import Float, Int64, Tensor

_NARROW = 128  # bytes of a row up to which numpy moves rows two to three times as fast as index_select
_ALIGNED = 64  # bytes, as torch's own allocations: products must not see another alignment


class MultiHeadTable(nn.Module):
    """The rows of one Engram layer, [rows, head]."""

    def __init__(self, rows: int, head_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, head_width))

    def forward(self, rows: Int64[Tensor, "B T S"]) -> Float[Tensor, "B T mem"]:
        """Read and concatenate: e_t.

        Raises: IndexError for a row that the table has not.
        """
        trained = self.weight.requires_grad and torch.is_grad_enabled()
        if trained or self.weight.device.type != "cpu" or torch.compiler.is_compiling():
            return nn.functional.embedding(rows, self.weight).flatten(-2)
        return gather_rows(self.weight, rows).flatten(-2)


@torch.no_grad()
def gather_rows(
    table: Float[Tensor, "rows head"], rows: Int64[Tensor, "*any"], out: Float[Tensor, "*any head"] | None = None
) -> Float[Tensor, "*any head"]:
    """`table[rows]` on a CPU, without a gradient.

    Args: out: an earlier result of the same shape to overwrite; a fresh one costs as much again in page faults.
    Raises: IndexError for a row that the table has not.
    """
    flat, width = rows.flatten(), table.shape[1] * table.element_size()
    if out is None:
        out = _aligned(len(flat) * width).view(table.dtype)
    out = out.view(len(flat), table.shape[1])
    if width > _NARROW or not len(flat):
        torch.index_select(table, 0, flat, out=out)
        return out.view(*rows.shape, table.shape[1])
    low, high = (int(x) for x in flat.aminmax())
    if low < 0 or high >= len(table):
        raise IndexError(f"expected rows in [0, {len(table)}), found {low if low < 0 else high}")
    plain = torch.int16 if table.dtype == torch.bfloat16 else table.dtype  # numpy has no bfloat16
    # "clip" cannot happen here; "raise" would go through a buffer.
    np.take(table.view(plain).numpy(), flat.numpy(), 0, out=out.view(plain).numpy(), mode="clip")
    return out.view(*rows.shape, table.shape[1])


def _aligned(size: int) -> Tensor:
    block = np.empty(size + _ALIGNED, dtype=np.uint8)
    start = -block.ctypes.data % _ALIGNED
    return torch.from_numpy(block[start : start + size])
