"""How is one row of a table read, wherever the table lies?

Every analysis of a table asks a `RowReader` for rows by number and gets float32, whether the rows are a tensor in
memory, bytes of a 190 GB safetensors file, or quantised GGUF blocks. A reader checks every index before it touches
anything. Misleads: a quantised row is what the running model sees, not what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64

CHUNK_BYTES = 32 * 2**20  # float32 bytes a streaming pass holds at once


class TableError(ValueError):
    """A table that cannot be read; the message names the file, what was expected and what was found."""


class RowIndexError(TableError, IndexError):
    """A row number outside the table."""


@runtime_checkable
class RowReader(Protocol):
    """Rows by number: `rows` of them, `width` columns, `name` says which table in messages and results."""

    rows: int
    width: int
    name: str

    def read(self, indices: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, "n width"]:
        """The rows, dequantised, in the order asked for.

        Raises: RowIndexError (a ValueError) naming the first index outside [0, rows).
        """
        ...


def check_indices(indices: Int64[np.ndarray, " n"], rows: int, name: str) -> None:
    """Refuse any index outside the table.

    Raises: RowIndexError naming the first one.
    """
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= rows):
        bad = int(indices[(indices < 0) | (indices >= rows)][0])
        raise RowIndexError(f"{name}: expected row numbers in [0, {rows}), found {bad}")


class ConcatenatedRows:
    """Several readers of one width, one after the other along the rows (a table cut into shards)."""

    def __init__(self, parts: Sequence[RowReader], name: str) -> None:
        if not parts or len({part.width for part in parts}) != 1:
            raise TableError(f"{name}: expected shards of one width, found {[part.width for part in parts]}")
        self._parts = tuple(parts)
        self._starts = np.cumsum([0, *(part.rows for part in parts)], dtype=np.int64)
        self.rows, self.width, self.name = int(self._starts[-1]), parts[0].width, name

    def read(self, indices: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, "n width"]:
        """See `RowReader.read`."""
        check_indices(indices, self.rows, self.name)
        out = np.empty((len(indices), self.width), dtype=np.float32)
        owner = np.searchsorted(self._starts, indices, side="right") - 1
        for part in np.unique(owner):
            mine = np.flatnonzero(owner == part)
            out[mine] = self._parts[part].read(indices[mine] - self._starts[part])
        return out


def chunk_rows(reader: RowReader, chunk_bytes: int = CHUNK_BYTES) -> int:
    """How many rows of a reader fit into `chunk_bytes` of float32, at least one."""
    return max(1, chunk_bytes // (4 * reader.width))


def chunks(
    reader: RowReader, start: int = 0, stop: int | None = None, *, chunk: int | None = None, progress: bool = False
) -> Iterator[tuple[int, Float32[np.ndarray, "n width"]]]:
    """Stream rows [start, stop) in order as (first row number, rows).

    Args: chunk: rows at a time, by default `CHUNK_BYTES` of float32; progress: show a bar on standard error.
    """
    from tqdm import tqdm

    stop = reader.rows if stop is None else stop
    step = chunk or chunk_rows(reader)
    with tqdm(total=stop - start, unit="row", unit_scale=True, desc=reader.name, disable=not progress) as bar:
        for first in range(start, stop, step):
            indices = np.arange(first, min(first + step, stop), dtype=np.int64)
            yield first, reader.read(indices)
            bar.update(len(indices))
