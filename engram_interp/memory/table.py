"""What does a row hold, and how is it read?

Paper eq. 2: one flat table for all orders and heads of a layer; the S rows a position addresses are concatenated,
order-major, into its memory vector e_t of width `S * head`.

Reading is a copy of rows, and on a CPU most of its time is not the copy: torch's `embedding` takes a fresh output from
the system page by page, and moves narrow rows slowly. `gather_rows` takes the memory of an earlier result that nobody
holds any more, else asks numpy for it (huge pages), and lets numpy move narrow rows; the values are the same bits.

The floor: each row is read once and written once. Rows of the 27B table (320 bytes) come from memory, six cache lines and
a page walk each: 0.1 us on one core, where a copy in order takes 0.02 us. Sorting the rows first costs more than it saves.
Misleads: up to `_KEPT` bytes of one result stay with the process after it is freed.
CUDA in one launch with the hash: `engram_interp.kernels.triton_ngram`.
"""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
import torch
from torch import nn

from engram_interp.shapes import Float, Int64, Tensor

_NARROW = 128  # bytes of a row up to which numpy moves rows two to three times as fast as index_select
_ALIGNED = 64  # bytes, as torch's own allocations: products must not see another alignment
_KEPT = 2**28  # bytes; a larger result goes back to the system
_free: deque[np.ndarray] = deque(maxlen=1)  # the memory of the last result that was freed


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

    Args: out: an earlier result of the same shape to overwrite; without it one that nobody holds, or fresh memory.
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
    """Bytes that come back to `_free` when the last tensor that sees them is gone."""
    block = _recycled(size + _ALIGNED)
    start = -block.ctypes.data % _ALIGNED
    seen = block[start : start + size]
    if len(block) <= _KEPT:
        weakref.finalize(seen, _free.append, block).atexit = False
    return torch.from_numpy(seen)


def _recycled(size: int) -> np.ndarray:
    try:
        block = _free.pop()
    except IndexError:
        return np.empty(size, dtype=np.uint8)
    return block if size <= len(block) <= 2 * size else np.empty(size, dtype=np.uint8)
