"""How are single rows of a table read from GGUF, the format most people run these models in?

Rows are stored whole, quantised in blocks along the row, so a row of `width` values is `width / block * block_bytes`
consecutive bytes. The `gguf` package (extra `formats`) dequantises them. Published layouts: Qwen3.8-Flash-Next keeps
its table in `per_layer_token_embd.weight` and the rest in `blk.N.ple_*`, constants under `qwen4exp.ple.*`;
DeepSeek-V4.1 in `blk.N.engram_embd.weight`, `blk.N.engram_*`, `deepseek41.engram.*`, its table quantised like any other
tensor (llama.cpp) or as the original bytes, 256 of E4M3 and then their 8 E8M0 scales in one row of I8, which the key
`*.engram.encoding` names (ds4). Files split by llama.cpp (`...-00001-of-00004.gguf`) open as one.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from engram_interp.memory.gguf_header import GgufTensor, MetadataValue, gguf_package, read_gguf_header
from engram_interp.memory.mapped_rows import MappedRows
from engram_interp.memory.row_reader import RowReader, TableError
from engram_interp.memory.safetensors_rows import decode_blocks, open_safetensors_rows

GGUF_TABLE_NAME = re.compile(r"^(per_layer_token_embd|blk\.\d+\.(engram|ple)_embd)\.weight$")
_ENCODING = re.compile(r"^e4m3_e8m0_(\d{1,9})_row(\d{1,9})$")
_SPLIT = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")


class GgufRows:
    """Rows of one two-dimensional GGUF tensor.

    Raises: TableError for another shape, or a type the `gguf` package cannot dequantise.
    """

    def __init__(self, tensor: GgufTensor) -> None:
        if len(tensor.shape) != 2 or tensor.shape[1] == 0:
            raise TableError(
                f"{tensor.path}: {tensor.name}: expected a shape [rows, width], found {list(tensor.shape)}"
            )
        self.name = tensor.name
        self.rows, self.width = tensor.shape
        self._tensor = tensor
        self._bytes = MappedRows(tensor.path, tensor.start, self.rows, tensor.size // max(self.rows, 1), tensor.name)
        dequantise(np.zeros((1, self._bytes.row_bytes), dtype=np.uint8), tensor)  # refuse an unreadable type now

    def read(self, indices: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, "n width"]:
        """See `RowReader.read`."""
        if not len(indices):
            return np.empty((0, self.width), dtype=np.float32)
        return dequantise(self._bytes.read(indices), self._tensor)


class PackedRows:
    """Rows of FP8 E4M3 codes followed by their E8M0 block scales, stored as GGML I8 under a named encoding.

    Raises: TableError for another encoding, or one that contradicts the tensor.
    """

    def __init__(self, tensor: GgufTensor, encoding: str) -> None:
        where = f"{tensor.path}: {tensor.name}"
        match = _ENCODING.match(encoding)
        if match is None:
            raise TableError(f"{where}: expected an encoding e4m3_e8m0_BLOCK_rowBYTES, found {encoding[:60]!r}")
        block, stored = int(match[1]), int(match[2])
        if len(tensor.shape) != 2 or tensor.shape[1] != stored or block < 1:
            raise TableError(f"{where}: expected a shape [rows, {stored}] by {encoding}, found {list(tensor.shape)}")
        scales = -(-stored // (block + 1))  # stored = width + ceil(width / block)
        self.name, self.rows, self.width = tensor.name, tensor.shape[0], stored - scales
        if self.width < 1 or (scales > 1 and self.width != scales * block):
            raise TableError(f"{where}: expected whole blocks of {block} by {encoding}, found {self.width} columns")
        self._bytes = MappedRows(tensor.path, tensor.start, self.rows, stored, tensor.name)

    def read(self, indices: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, "n width"]:
        """See `RowReader.read`."""
        raw = self._bytes.read(indices)
        return decode_blocks(raw[:, : self.width], raw[:, self.width :])


def _typed(raw: np.ndarray, kind: int) -> np.ndarray:
    """Plain floats need their own dtype; everything else stays bytes."""
    kinds = gguf_package().GGMLQuantizationType
    plain = {kinds.F32: "<f4", kinds.F16: "<f2"}
    return raw.view(plain[kind]) if kind in plain else raw


def dequantise(raw: np.ndarray, tensor: GgufTensor) -> np.ndarray:
    """Values of whole rows given as bytes [rows, row_bytes].

    Raises: TableError for a type that cannot be dequantised.
    """
    gguf = gguf_package()
    kind = gguf.GGMLQuantizationType(tensor.kind)
    try:
        return gguf.dequantize(_typed(raw, kind), kind).astype(np.float32, copy=False)
    except NotImplementedError:
        raise TableError(f"{tensor.path}: {tensor.name}: cannot dequantise GGML type {kind.name}") from None


class GgufFile:
    """Metadata and tensors of a GGUF model, which may be split over several files.

    Raises: TableError for a missing part, a damaged header, or a tensor in two parts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, MetadataValue] = {}
        self.tensors: dict[str, GgufTensor] = {}
        self.parts = tuple(_parts(path))
        for part in self.parts:
            header = read_gguf_header(part)
            self.metadata = header.metadata | self.metadata  # the first part speaks for all
            if twice := header.tensors.keys() & self.tensors.keys():
                raise TableError(f"{part}: tensor {min(twice)!r} is also in another part")
            self.tensors |= header.tensors

    def tensor(self, name: str) -> Float32[np.ndarray, "*any"]:
        """A whole tensor, dequantised; meant for the small ones.

        Raises: TableError when it is missing.
        """
        info = self.info(name)
        rows = math.prod(info.shape[:-1])
        if math.prod(info.shape) == 0:
            return np.zeros(info.shape, dtype=np.float32)
        stored = MappedRows(info.path, info.start, rows, info.size // rows, name)
        return dequantise(stored.read(np.arange(rows, dtype=np.int64)), info).reshape(info.shape)

    def rows(self, name: str | None = None) -> RowReader:
        """The rows of a table; None if there is exactly one memory table.

        Raises: TableError when the tensor is missing, is no table, or the choice is not clear.
        """
        tables = [tensor for tensor in self.tensors if GGUF_TABLE_NAME.match(tensor)]
        if name is None:
            if len(tables) != 1:
                found = ", ".join(tables[:8]) or f"none among {len(self.tensors)} tensors"
                raise TableError(f"{self.path}: expected exactly one memory table, found {found}; name the tensor")
            name = tables[0]
        tensor, encoding = self.info(name), self.metadata.get(f"{self.architecture}.engram.encoding")
        return PackedRows(tensor, encoding) if isinstance(encoding, str) and _is_bytes(tensor) else GgufRows(tensor)

    @property
    def architecture(self) -> str:
        """`general.architecture`; empty where the file does not say."""
        return str(self.metadata.get("general.architecture", ""))

    def info(self, name: str) -> GgufTensor:
        """Where a tensor lies.

        Raises: TableError when it is missing.
        """
        if name not in self.tensors:
            raise TableError(f"{self.path}: no tensor {name[:120]!r} among {len(self.tensors)}")
        return self.tensors[name]


def _is_bytes(tensor: GgufTensor) -> bool:
    return tensor.kind == gguf_package().GGMLQuantizationType.I8


def _parts(path: Path) -> list[Path]:
    split = _SPLIT.match(path.name)
    if split is None:
        return [path]
    total = int(split[3])
    if not 1 <= int(split[2]) <= total:
        raise TableError(f"{path}: expected a part number in 1 to {total}")
    return [path.with_name(f"{split[1]}-{number:05}-of-{split[3]}.gguf") for number in range(1, total + 1)]


def open_rows(path: Path, name: str | None = None, scale: str | None = None) -> RowReader:
    """The rows of a table, whatever the file: GGUF by its ending, else safetensors (file, index or directory).

    Args: name: the tensor; None if there is exactly one memory table. scale: block scales of an FP8 safetensors table.
    Raises: TableError.
    """
    if path.suffix == ".gguf":
        return GgufFile(path).rows(name)
    return open_safetensors_rows(path, name, scale)
