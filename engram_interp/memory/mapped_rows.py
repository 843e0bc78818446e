"""How are the bytes of a few rows read from a file far larger than memory?

The file is mapped; a read touches one page per row (two when it straddles a boundary). Scattered reads switch the
kernel's read-ahead off (10,000 rows of a sparse 183 GB file: 0.2 s; with read-ahead 117 s), contiguous ones leave it
on, and every read gives its pages back, so memory stays at one request. The file's length is checked again before each
read, because touching a mapped page of a file that has shrunk kills the process.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8

from engram_interp.memory.row_reader import TableError, check_indices


class MappedRows:
    """`rows` rows of `row_bytes` bytes from byte `offset` of a file on.

    Raises: TableError when the file cannot be opened or ends before the last row.
    """

    def __init__(self, path: Path, offset: int, rows: int, row_bytes: int, name: str) -> None:
        self.path, self.rows, self.row_bytes, self.name = path, rows, row_bytes, name
        self._end = offset + rows * row_bytes
        self._bytes = np.empty((rows, row_bytes), dtype=np.uint8) if rows * row_bytes == 0 else self._map(offset)

    def _map(self, offset: int) -> np.ndarray:
        try:
            with self.path.open("rb") as file:
                self._check_length(os.fstat(file.fileno()).st_size)
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise TableError(f"{self.path}: cannot be mapped ({error.strerror})") from None
        return np.ndarray((self.rows, self.row_bytes), dtype=np.uint8, buffer=self._mapping, offset=offset)

    def _check_length(self, length: int) -> None:
        if length < self._end:
            raise TableError(f"{self.path}: expected at least {self._end} bytes for {self.name}, found {length}")

    def read(self, indices: Int64[np.ndarray, " n"]) -> UInt8[np.ndarray, "n row_bytes"]:
        """The rows' bytes, copied out of the file.

        Raises: RowIndexError for an index outside the table; TableError when the file has been cut since it was opened.
        """
        check_indices(indices, self.rows, self.name)
        if not len(indices) or not self.row_bytes:
            return np.empty((len(indices), self.row_bytes), dtype=np.uint8)
        self._check_length(self._mapping.size())
        contiguous = len(indices) > 1 and bool((np.diff(indices) == 1).all())
        self._advise("MADV_NORMAL" if contiguous else "MADV_RANDOM")
        first = int(indices[0])
        out = self._bytes[first : first + len(indices)].copy() if contiguous else self._bytes[indices]
        self._advise("MADV_DONTNEED")  # the pages stay in the kernel's cache, not in this process
        return out

    def _advise(self, advice: str) -> None:
        if hasattr(mmap, advice):  # absent on Windows
            self._mapping.madvise(getattr(mmap, advice))
