"""What does a GGUF file hold, and where?

GGUF (version 2 and 3, little-endian): magic, version, counts, key-value pairs, tensor infos, then aligned tensor data.
This parser checks every length against the file before it reads or allocates, which the `gguf` package's reader does
not (a claim of 2^60 array elements keeps it busy for ever). Type numbers and block sizes are that package's. Cost: the
header; long string arrays (a tokenizer) are stepped over, number arrays become numpy arrays.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from engram_interp.memory.row_reader import TableError

_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_MAX_HEADER = 2**30
_MAX_DIMENSIONS = 4

MetadataValue = bool | int | float | str | np.ndarray | list[str]


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: `shape` in numpy order (rows first), `kind` the GGML type number, `start` its first byte in the
    file.
    """

    path: Path
    name: str
    kind: int
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """Key-value pairs and tensors of one file."""

    metadata: dict[str, MetadataValue]
    tensors: dict[str, GgufTensor]


def gguf_package() -> ModuleType:
    """The `gguf` package, which knows block sizes and how to dequantise.

    Raises: TableError when it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise TableError("reading GGUF needs the package gguf; install engram-interp[formats]") from None
    return gguf


class _Cursor:
    """Reads numbers and strings, and never past the end."""

    def __init__(self, path: Path) -> None:
        self.path, self.size, self.position = path, path.stat().st_size, 0
        self._file = path.open("rb")

    def __enter__(self) -> _Cursor:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def take(self, count: int, what: str) -> bytes:
        if self.position + count > min(self.size, _MAX_HEADER):
            raise TableError(f"{self.path}: expected {count} bytes of {what} at byte {self.position} of {self.size}")
        self.position += count
        return self._file.read(count)

    def unsigned(self, width: int, what: str) -> int:
        return int.from_bytes(self.take(width, what), "little")

    def text(self, what: str) -> str:
        raw = self.take(self.unsigned(8, what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise TableError(f"{self.path}: {what} before byte {self.position} is not UTF-8") from None

    def value(self, kind: int, key: str) -> MetadataValue:
        if kind == _STRING:
            return self.text(key)
        if kind in _SCALARS:
            return self.numbers(kind, 1, key)[0].item()
        if kind != _ARRAY:
            raise TableError(f"{self.path}: {key}: expected a GGUF value type, found {kind}")
        element, count = self.unsigned(4, key), self.unsigned(8, key)
        if element == _STRING:
            if count > (self.size - self.position) // 8:  # a string is at least its length
                raise TableError(f"{self.path}: {key}: claims {count} strings in a file of {self.size} bytes")
            return [self.text(key) for _ in range(count)]
        return self.numbers(element, count, key)

    def numbers(self, kind: int, count: int, key: str) -> np.ndarray:
        if kind not in _SCALARS:
            raise TableError(f"{self.path}: {key}: expected an array of numbers or strings, found type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(dtype.itemsize * count, key), dtype=dtype)


def read_gguf_header(path: Path) -> GgufHeader:
    """Parse and check the header of one file.

    Raises: TableError for a file that is no GGUF, is truncated, or whose header contradicts itself or the file.
    """
    if not path.is_file():
        raise TableError(f"{path}: no such file")
    try:
        with _Cursor(path) as cursor:
            return _parse(cursor)
    except OSError as error:
        raise TableError(f"{path}: cannot be read ({error.strerror})") from None


def _parse(cursor: _Cursor) -> GgufHeader:
    magic, version, tensor_count, pair_count = struct.unpack("<4sIQQ", cursor.take(24, "GGUF header"))
    if magic != b"GGUF" or version not in (2, 3):
        raise TableError(
            f"{cursor.path}: expected little-endian GGUF version 2 or 3, found {magic!r} version {version}"
        )
    metadata: dict[str, MetadataValue] = {}
    for _ in range(pair_count):
        key = cursor.text("a key")
        if key in metadata:
            raise TableError(f"{cursor.path}: key {key[:80]!r} occurs twice")
        metadata[key] = cursor.value(cursor.unsigned(4, key[:80]), key[:80])
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise TableError(f"{cursor.path}: expected general.alignment to be a power of two, found {alignment!r}")
    data_start = -(-cursor.position // alignment) * alignment
    tensors = [_tensor(cursor, *info, data_start, alignment) for info in infos]
    _check_layout(cursor.path, tensors)
    return GgufHeader(metadata, {tensor.name: tensor for tensor in tensors})


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.text("a tensor name")
    dimensions = cursor.unsigned(4, name[:80])
    if dimensions > _MAX_DIMENSIONS:
        raise TableError(f"{cursor.path}: {name[:80]!r}: expected at most 4 dimensions, found {dimensions}")
    shape = tuple(cursor.unsigned(8, name[:80]) for _ in range(dimensions))
    return name, shape[::-1], cursor.unsigned(4, name[:80]), cursor.unsigned(8, name[:80])


def _tensor(
    cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int, offset: int, data_start: int, alignment: int
) -> GgufTensor:
    gguf = gguf_package()
    where = f"{cursor.path}: {name[:80]!r}"
    if kind not in set(gguf.GGMLQuantizationType):
        raise TableError(f"{where}: expected a known GGML type, found {kind}")
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    width = shape[-1] if shape else 1
    if width % block:
        raise TableError(f"{where}: expected rows of whole blocks of {block}, found width {width}")
    size = math.prod(shape) // block * block_bytes
    if offset % alignment or data_start + offset + size > cursor.size:
        raise TableError(
            f"{where}: claims bytes {data_start + offset} to {data_start + offset + size} of {cursor.size}"
        )
    return GgufTensor(cursor.path, name, kind, shape, data_start + offset, size)


def _check_layout(path: Path, tensors: list[GgufTensor]) -> None:
    position, names = 0, set()
    for tensor in sorted(tensors, key=lambda t: (t.start, t.size)):
        if tensor.start < position or tensor.name in names:
            raise TableError(f"{path}: {tensor.name[:80]!r} overlaps another tensor or occurs twice")
        position = tensor.start + tensor.size
        names.add(tensor.name)
