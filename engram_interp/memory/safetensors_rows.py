"""How are single rows of a safetensors table read without loading it?

A row of a C-ordered [rows, width] tensor is `width * itemsize` consecutive bytes, so the header says where it is.
Tables come as one tensor, as shards of one tensor (`...shard_0.weight`, `...shard_1.weight`, ...), and as FP8 E4M3 with
one scale per block of columns (E8M0, a power of two, or F32). Cost: one page per row. A 196 GB table needs no more
memory than a small one. Misleads: nothing here knows which tensor is a memory table; names of published layouts are
recognised, others must be given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from engram_interp.memory.mapped_rows import MappedRows
from engram_interp.memory.row_reader import ConcatenatedRows, RowReader, TableError
from engram_interp.memory.safetensors_header import TensorEntry, TensorFiles

# V4.1, Qwen (one tensor or shards), demo and engram-peft, house.
TABLE_NAME = re.compile(
    r"(^|\.)(engram\.embed|ngram_embedding(\.shard_\d{1,9})?|multi_head_embedding\.embedding|engram\.table)\.weight$"
)
_SHARD = re.compile(r"\.shard_(\d{1,9})\.")
_ALL_SHARDS = ".shard_*."


def _e4m3() -> Float32[np.ndarray, "256"]:
    codes = np.arange(256)
    sign, exponent, mantissa = np.where(codes < 128, 1.0, -1.0), (codes >> 3) & 15, codes & 7
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    return np.where((codes & 127) == 127, np.nan, sign * magnitude).astype(np.float32)


def _e8m0() -> Float32[np.ndarray, "256"]:
    return np.where(np.arange(256) == 255, np.nan, 2.0 ** (np.arange(256) - 127.0)).astype(np.float32)


def _bf16(raw: UInt8[np.ndarray, "n bytes"]) -> Float32[np.ndarray, "n width"]:
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


_E4M3, _E8M0 = _e4m3(), _e8m0()
_DECODE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": lambda raw: raw.view("<f4").astype(np.float32, copy=False),
    "F16": lambda raw: raw.view("<f2").astype(np.float32),
    "BF16": _bf16,
    "F8_E4M3": lambda raw: _E4M3[raw],
    "F8_E8M0": lambda raw: _E8M0[raw],
}
_TABLE_DTYPES = ("F32", "F16", "BF16", "F8_E4M3")
_SCALE_DTYPES = ("F8_E8M0", "F32", "BF16")


def decode_blocks(
    codes: UInt8[np.ndarray, "n width"], scales: UInt8[np.ndarray, "n blocks"]
) -> Float32[np.ndarray, "n width"]:
    """FP8 E4M3 codes times their E8M0 scales, each for `width / blocks` columns."""
    return _scaled(_E4M3[codes], _E8M0[scales])


def _scaled(
    values: Float32[np.ndarray, "n width"], scales: Float32[np.ndarray, "n blocks"]
) -> Float32[np.ndarray, "n width"]:
    blocks = values.reshape(*scales.shape, values.shape[1] // scales.shape[1])
    with np.errstate(over="ignore"):  # 448 times 2^127 is inf, as in every other program
        return (blocks * scales[:, :, None]).reshape(values.shape)


class SafetensorsRows:
    """Rows of one two-dimensional tensor.

    Args: scale: for FP8, a tensor [rows, blocks] whose every value multiplies `width / blocks` columns.
    Raises: TableError for a tensor that is not a table, an unreadable dtype, FP8 without a scale, or a scale that does
    not fit.
    """

    def __init__(self, entry: TensorEntry, scale: TensorEntry | None = None) -> None:
        self.name = entry.name
        self.rows, self.width = _require_matrix(entry, _TABLE_DTYPES)
        self._decode = _DECODE[entry.dtype]
        self._bytes = _map(entry)
        self._scale: MappedRows | None = None
        if entry.dtype == "F8_E4M3" and scale is None:
            raise TableError(
                f"{entry.path}: {entry.name} is FP8; expected a tensor of block scales beside it, found none"
            )
        if scale is not None:
            rows, blocks = _require_matrix(scale, _SCALE_DTYPES)
            if rows != self.rows or blocks == 0 or self.width % blocks:
                raise TableError(
                    f"{scale.path}: {scale.name}: expected scales [{self.rows}, a divisor of {self.width}], "
                    f"found {list(scale.shape)}"
                )
            self._scale, self._decode_scale = _map(scale), _DECODE[scale.dtype]

    def read(self, indices: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, "n width"]:
        """See `RowReader.read`."""
        values = self._decode(self._bytes.read(indices))
        if self._scale is None:
            return values
        return _scaled(values, self._decode_scale(self._scale.read(indices)))


def _require_matrix(entry: TensorEntry, dtypes: tuple[str, ...]) -> tuple[int, int]:
    if entry.dtype not in dtypes:
        raise TableError(f"{entry.path}: {entry.name}: expected dtype {', '.join(dtypes)}, found {entry.dtype}")
    if len(entry.shape) != 2 or entry.shape[1] == 0:
        raise TableError(f"{entry.path}: {entry.name}: expected a shape [rows, width], found {list(entry.shape)}")
    return entry.shape


def _map(entry: TensorEntry) -> MappedRows:
    rows = entry.shape[0]
    return MappedRows(entry.path, entry.start, rows, (entry.stop - entry.start) // max(rows, 1), entry.name)


def table_names(names: Iterable[str]) -> list[str]:
    """Those of the names that published layouts give to memory tables, sorted; shards appear once, as `shard_*`."""
    return sorted({_SHARD.sub(_ALL_SHARDS, name) for name in names if TABLE_NAME.search(name)})


def open_safetensors_rows(path: Path, name: str | None = None, scale: str | None = None) -> RowReader:
    """The rows of a table in a file, a sharded directory, or a directory with an index.

    Args: name: the tensor, or its shards with `*` for the number; None if the files hold exactly one table. scale: the
    tensor of block scales; None looks for `.scale`, `.weight_scale` and `.weight_scale_inv` beside an FP8 table.
    Raises: TableError for anything missing, damaged, ambiguous or of a wrong dtype.
    """
    files = TensorFiles(path)
    tables = table_names(files.names)
    if name is None:
        if len(tables) != 1:
            found = ", ".join(tables[:8]) or f"none among {len(files.names)} tensors"
            raise TableError(f"{path}: expected exactly one memory table, found {found}; name the tensor")
        name = tables[0]
    if _ALL_SHARDS not in name:
        return _open_one(files, name, scale)
    return ConcatenatedRows([_open_one(files, shard, None) for shard in _shard_names(files, name)], name)


def _shard_names(files: TensorFiles, pattern: str) -> list[str]:
    head, tail = pattern.split(_ALL_SHARDS, 1)
    numbers = {int(m[1]) for n in files.names if (m := _SHARD.search(n)) and _SHARD.sub(_ALL_SHARDS, n) == pattern}
    missing = next(number for number in count() if number not in numbers)
    if missing != len(numbers) or not numbers:
        raise TableError(f"{files.path}: {pattern}: shard {missing} is missing")
    return [f"{head}.shard_{number}.{tail}" for number in range(len(numbers))]


def _open_one(files: TensorFiles, name: str, scale: str | None) -> SafetensorsRows:
    entry = files.entry(name)
    if scale is None and entry.dtype == "F8_E4M3":
        stem = name.removesuffix(".weight")
        candidates = (f"{stem}.scale", f"{stem}.weight_scale", f"{stem}.weight_scale_inv")
        scale = next((candidate for candidate in candidates if candidate in files.names), None)
    return SafetensorsRows(entry, files.entry(scale) if scale else None)
