"""How does a model run whose table does not fit beside it?

Addresses depend on token ids alone, so the rows of a step are known before its forward starts (paper section 2.5): a background
thread reads the next step's rows while this one computes. `offloaded(model, readers)` puts row readers in the place of the tables and
puts the tables back afterwards; `ahead(tokens)` starts the reading for tokens to come. On CUDA the rows go through pinned memory and a
side stream; that path has not been timed on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from engram_interp.memory.hashing import NgramHash
from engram_interp.shapes import Float, Int64, Tensor

if TYPE_CHECKING:
    from engram_interp.memory.row_reader import RowReader


class OffloadedTable(nn.Module):
    """Rows read on demand, or before they are asked for. `hits` and `misses` count forwards with and without prefetched rows."""

    def __init__(self, reader: RowReader, pool: ThreadPoolExecutor, device: torch.device) -> None:
        super().__init__()
        self.reader = reader
        self.hits = self.misses = 0
        self._pool = pool
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._coming: list[tuple[Tensor, Future[Tensor]]] = []

    def prefetch(self, rows: Int64[Tensor, "B T S"]) -> None:
        """Start to read the rows that a later forward will ask for; forwards come in the order of their prefetches."""
        self._coming.append((rows, self._pool.submit(self._read, rows)))

    def forward(self, rows: Int64[Tensor, "B T S"]) -> Float[Tensor, "B T mem"]:
        """The rows, concatenated: those prefetched when they are the ones asked for, else read now."""
        if self._coming and torch.equal(self._coming[0][0], rows):
            self.hits += 1
            read = self._coming.pop(0)[1].result()
        else:
            self.misses += 1
            read = self._read(rows)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return read.unflatten(0, rows.shape).flatten(-2)

    def _read(self, rows: Tensor) -> Tensor:
        read = torch.from_numpy(self.reader.read(rows.flatten().cpu().numpy()))
        if self._stream is None:
            return read
        with torch.cuda.stream(self._stream):
            return read.pin_memory().to(self._device, non_blocking=True)


class Offload:
    """The memories of a model while their tables are elsewhere."""

    def __init__(self, tables: Mapping[int, OffloadedTable], hashes: Mapping[int, NgramHash]) -> None:
        self.tables = tables
        self._hashes = hashes

    def ahead(self, tokens: Int64[Tensor, "B T"]) -> None:
        """Start to read what a later `model(tokens)` will read, in every memory."""
        for block, table in self.tables.items():
            ngram_hash = self._hashes[block]
            table.prefetch(ngram_hash.addressed_rows(tokens))


@contextmanager
def offloaded(model: Any, readers: Mapping[int, RowReader]) -> Iterator[Offload]:
    """Read the tables of a house model from elsewhere while inside.

    Args: readers: a row reader for every block with a memory.
    Raises: ValueError when a block has no reader, or a reader has other rows or columns than the table.
    """
    engrams = {block: model.engram(block) for block in model.engram_layers}
    if set(engrams) != set(readers):
        raise ValueError(f"expected a reader for each of the blocks {sorted(engrams)}, found {sorted(readers)}")
    for block, engram in engrams.items():
        found, expected = (readers[block].rows, readers[block].width), tuple(engram.table.weight.shape)
        if found != expected:
            raise ValueError(f"block {block}: expected a table of shape {expected}, found a reader of {found}")
    kept = {block: engram.table for block, engram in engrams.items()}
    with ThreadPoolExecutor(1, thread_name_prefix="rows") as pool:
        tables = {
            block: OffloadedTable(readers[block], pool, engram.table.weight.device) for block, engram in engrams.items()
        }
        try:
            for block, engram in engrams.items():
                engram.table = tables[block]
            yield Offload(tables, {block: engram.ngram_hash for block, engram in engrams.items()})
        finally:
            for block, engram in engrams.items():
                engram.table = kept[block]
