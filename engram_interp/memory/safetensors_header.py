"""Which bytes of a safetensors file belong to which tensor?

A file is an 8-byte little-endian header length, that many bytes of JSON {name: {dtype, shape, data_offsets}}, then the
data, which the tensors tile in order without holes or overlaps (safetensors format). A downloaded header is not to be
trusted: every number is checked against the file before anything is read. Cost: the header alone.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from engram_interp.memory.row_reader import TableError

MAX_JSON = 100_000_000  # bytes; the limit of the format's reference implementation
INDEX = "model.safetensors.index.json"

BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of one file: `start` and `stop` are byte positions in the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file by name.

    Raises: TableError saying what in the file is not as the format demands.
    """
    if not path.is_file():
        raise TableError(f"{path}: no such file")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= MAX_JSON or 8 + length > size:
                raise TableError(f"{path}: expected a safetensors header, found a claim of {length} bytes in {size}")
            raw = file.read(length)
    except OSError as error:
        raise TableError(f"{path}: cannot be read ({error.strerror})") from None
    header = parse_object(raw, path)
    header.pop("__metadata__", None)
    entries = [_entry(path, name, fields, 8 + length) for name, fields in header.items()]
    _check_tiling(path, entries, 8 + length, size)
    return {entry.name: entry for entry in entries}


def parse_object(raw: bytes, path: Path) -> dict[str, object]:
    """A JSON object in which no key occurs twice.

    Raises: TableError for anything else.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key occurs twice")
        return found

    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise TableError(f"{path}: expected a JSON object, found damaged JSON ({str(error)[:80]})") from None
    if not isinstance(parsed, dict):
        raise TableError(f"{path}: expected a JSON object, found {type(parsed).__name__}")
    return parsed


def _entry(path: Path, name: str, fields: object, data_start: int) -> TensorEntry:
    where = f"{path}: tensor {name[:80]!r}"
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise TableError(f"{where}: expected dtype, shape and data_offsets, found {str(fields)[:80]}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise TableError(f"{where}: expected a dtype of the format, found {str(dtype)[:40]!r}")
    if not _sizes(shape):
        raise TableError(f"{where}: expected a shape of non-negative integers, found {str(shape)[:80]}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise TableError(f"{where}: expected two ascending data_offsets, found {str(offsets)[:80]}")
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise TableError(
            f"{where}: {dtype} {shape} needs {bits / 8:g} bytes, data_offsets span {offsets[1] - offsets[0]}"
        )
    return TensorEntry(path, name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _sizes(values: object) -> bool:
    return isinstance(values, list) and len(values) <= 64 and all(type(v) is int and 0 <= v < 2**60 for v in values)


def _check_tiling(path: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    position = data_start
    for entry in sorted(entries, key=lambda e: (e.start, e.stop)):
        if entry.start != position:
            raise TableError(
                f"{path}: tensor {entry.name[:80]!r} should start at byte {position}, starts at {entry.start} "
                "(tensors may neither overlap nor leave holes)"
            )
        position = entry.stop
    if position != size:
        raise TableError(f"{path}: the header describes {position} bytes, the file has {size}")


class TensorFiles:
    """The tensors of one file, of an index file, or of a directory of shards.

    A shard that an index names may be absent until one of its tensors is asked for: a table needs few of a model's
    shards.
    Raises: TableError for a missing path, an unusable index, or a name in two files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._headers: dict[Path, dict[str, TensorEntry]] = {}
        self._files = list_tensors(path)
        self.names = tuple(self._files)

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor lies.

        Raises: TableError when no file holds it, or its file is missing or damaged.
        """
        if name not in self._files:
            raise TableError(f"{self.path}: no tensor {name[:120]!r} among {len(self.names)}")
        file = self._files[name]
        if file not in self._headers:
            self._headers[file] = read_header(file)
        entries = self._headers[file]
        if name not in entries:
            raise TableError(f"{self._files[name]}: the index promises {name[:120]!r}, the file does not hold it")
        return entries[name]


def list_tensors(path: Path) -> dict[str, Path]:
    """Tensor name to the file that should hold it: one file, an index file, or a directory of shards.

    Raises: TableError for a missing path, an unusable index, or a name in two files.
    """
    if path.is_dir() and (path / INDEX).is_file():
        return _read_index(path / INDEX)
    if path.name.endswith(".index.json") and path.is_file():
        return _read_index(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise TableError(f"{path}: expected {INDEX} or *.safetensors files, found neither")
    found: dict[str, Path] = {}
    for file in files:
        for name in read_header(file):
            if name in found:
                raise TableError(f"{path}: tensor {name[:80]!r} is in {found[name].name} and in {file.name}")
            found[name] = file
    return found


def _read_index(path: Path) -> dict[str, Path]:
    if path.stat().st_size > MAX_JSON:
        raise TableError(f"{path}: expected an index of at most {MAX_JSON} bytes, found {path.stat().st_size}")
    weight_map = parse_object(path.read_bytes(), path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise TableError(f"{path}: expected an object 'weight_map', found {type(weight_map).__name__}")
    for name, file in weight_map.items():
        if not _is_plain_name(file):
            raise TableError(
                f"{path}: tensor {name[:80]!r}: expected a plain *.safetensors file name, found {str(file)[:80]!r}"
            )
    return {name: path.parent / file for name, file in weight_map.items()}


def _is_plain_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not name.startswith(".")
        and not any(c in "/\\:" or ord(c) < 32 for c in name)
    )
