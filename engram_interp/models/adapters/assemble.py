"""How does an Engram layer stored under other names become ours, without loading a table that does not fit?

The module is built without memory (on the meta device) and its parameters are put in place. A table small enough
becomes an ordinary parameter; a larger one is left in its file, and every forward reads the rows it addresses, each
once.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from engram_interp.memory import Engram, EngramOptions, NgramHash
from engram_interp.memory.row_reader import RowReader, TableError
from engram_interp.models.adapters.tensors import AdapterError
from engram_interp.shapes import Float, Int64, Tensor

RESIDENT_BYTES = 2**30  # a table up to this size in float32 is loaded


class StoredTable(nn.Module):
    """A table that stays in its file; reads like `MultiHeadTable`. It has no gradient."""

    def __init__(self, reader: RowReader) -> None:
        super().__init__()
        self.reader = reader

    def forward(self, rows: Int64[Tensor, "B T S"]) -> Float[Tensor, "B T mem"]:
        """Read each addressed row once and concatenate: e_t.

        Raises: RowIndexError for a row outside the table.
        """
        unique, where = np.unique(rows.cpu().numpy(), return_inverse=True)
        values = torch.from_numpy(self.reader.read(unique)).to(rows.device)
        return values[torch.from_numpy(where.reshape(-1)).to(rows.device)].view(*rows.shape[:-1], -1)

    @property
    def weight(self) -> Tensor:
        """Raises: TableError: what needs the whole table in memory cannot be had of one that stays in its file."""
        raise TableError(
            f"expected a table in memory, found {self.reader.name} with {self.reader.rows:,} rows, which stays in its file"
        )


class StoredEmbedding(StoredTable):
    """A `StoredTable` called like `nn.Embedding`, for a host's own code; its `weight` has a shape and no values."""

    def forward(self, rows: Int64[Tensor, "B T S"]) -> Float[Tensor, "B T S head"]:
        """The rows, one by one."""
        return super().forward(rows).unflatten(-1, (rows.shape[-1], -1))

    @property
    def weight(self) -> Tensor:
        """On the meta device, where hosts look for the device to send ids to: they stay where they are."""
        return torch.empty(self.reader.rows, self.reader.width, device="meta")


def assemble_engram(
    ngram_hash: NgramHash,
    options: EngramOptions,
    weights: Mapping[str, Tensor],
    rows: RowReader | Float[Tensor, "rows head"],
    *,
    resident_bytes: int = RESIDENT_BYTES,
) -> Engram:
    """An Engram layer from loaded weights (our names, without the table) and a table.

    Args: rows: a reader, loaded when it fits into `resident_bytes`, or the weight itself (shared, not copied); rows
        after the last head are padding and are never read.
    Raises: AdapterError when the table or a weight does not fit the hash and the options.
    """
    if isinstance(rows, torch.Tensor):
        found_rows, found_width = rows.shape
    else:
        found_rows, found_width = rows.rows, rows.width
    if found_rows < ngram_hash.rows or found_width != options.head_width:
        raise AdapterError(
            f"expected a table of [{ngram_hash.rows}, {options.head_width}] by the configuration, "
            f"found [{found_rows}, {found_width}]"
        )
    with torch.device("meta"):
        engram = Engram(ngram_hash, options)
    table: Tensor | None = None
    if isinstance(rows, torch.Tensor):
        table = rows.detach()[: ngram_hash.rows]
    elif 4 * ngram_hash.rows * options.head_width <= resident_bytes:
        table = torch.from_numpy(rows.read(np.arange(ngram_hash.rows, dtype=np.int64)))
    if table is None:
        engram.table = StoredTable(rows)  # type: ignore[assignment, arg-type]
    state = dict(weights) | ({} if table is None else {"table.weight": table})
    expected = {name: tuple(parameter.shape) for name, parameter in engram.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if found != expected:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))[0]
        raise AdapterError(
            f"{wrong}: expected shape {expected.get(wrong)} by the configuration, found {found.get(wrong)}"
        )
    engram.load_state_dict({name: tensor.detach() for name, tensor in state.items()}, strict=True, assign=True)
    return engram.eval().requires_grad_(False)
