"""Which rows differ between two tables?

Row edits ("write this fact") and requantised copies change some rows and leave the others equal to the last bit. Both
tables are streamed side by side and compared after dequantisation, so a copy in another format differs where its values
do. Cost: one pass over both, two chunks of memory. Misleads: a table stored with less precision differs almost
everywhere; read the relative size of the change before calling it an edit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from engram_interp.memory.row_reader import RowReader, TableError, chunks


@dataclass(frozen=True, eq=False)
class TableDiff:
    """The rows that differ, ascending. `change` is |b - a|, `before` is |a|, `cosine` between a and b (nan for a zero
    row).
    """

    compared: int
    rows: Int64[np.ndarray, " changed"]
    change: Float32[np.ndarray, " changed"]
    before: Float32[np.ndarray, " changed"]
    cosine: Float32[np.ndarray, " changed"]


def diff_rows(a: RowReader, b: RowReader, *, progress: bool = False) -> TableDiff:
    """Compare two tables row by row; values that are not finite are equal to themselves.

    Raises: TableError when they differ in shape.
    """
    if (a.rows, a.width) != (b.rows, b.width):
        raise TableError(
            f"expected two tables of one shape, found {a.name} [{a.rows}, {a.width}] and {b.name} [{b.rows}, {b.width}]"
        )
    found = []
    for start, left in chunks(a, progress=progress):
        right = b.read(np.arange(start, start + len(left), dtype=np.int64))
        differs = ((left != right) & ~(np.isnan(left) & np.isnan(right))).any(1)
        rows = np.flatnonzero(differs)
        found.append((start + rows, *_measure(left[rows], right[rows])))
    columns = (
        [np.concatenate(column) for column in zip(*found, strict=True)] if found else [_NO_ROWS, *[_NO_VALUES] * 3]
    )
    return TableDiff(a.rows, *columns)


_NO_ROWS = np.array([], dtype=np.int64)
_NO_VALUES = np.array([], dtype=np.float32)


def _measure(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        before, after = np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1)
        cosine = (left * right).sum(1) / (before * after)
        return np.linalg.norm(right - left, axis=1), before, cosine
