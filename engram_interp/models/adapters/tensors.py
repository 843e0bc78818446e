"""How are the small tensors of somebody else's checkpoint read without trusting it?

The safetensors header says where a tensor lies; only those bytes are read, after every size has been checked against
the file. FP8 weights with block scales are dequantised exactly: w[i, j] * scale[i // block, j // block], float32.
Nothing is unpickled.
Cost: the named tensors. Tables are not read here (`engram_interp.memory.safetensors_rows` reads them row by row).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ValidationError

from engram_interp.memory.row_reader import TableError
from engram_interp.memory.safetensors_header import TensorEntry, list_tensors, parse_object, read_header
from engram_interp.models.checkpoint import CONFIG, CheckpointError
from engram_interp.shapes import Float, Shaped, Tensor

_TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
}
FLOATS = ("F32", "F16", "BF16")
MAX_CONFIG_BYTES = 16 * 2**20
HASHED_BYTES = 4 * 2**30  # larger checkpoints are identified by a sample
_SAMPLE = 2**20

Config = TypeVar("Config", bound=BaseModel)


class AdapterError(CheckpointError):
    """A foreign model that cannot be opened; the message names what was expected and what was found."""


class TensorFiles:
    """The tensors of a checkpoint directory or file, by name.

    Raises: AdapterError for a missing directory, an index with unusable file names, or a damaged header.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._headers: dict[Path, dict[str, TensorEntry]] = {}
        try:
            self._files = list_tensors(path)
        except TableError as error:
            raise AdapterError(str(error)) from None

    @property
    def names(self) -> Sequence[str]:
        """All tensor names."""
        return tuple(self._files)

    @property
    def files(self) -> Sequence[Path]:
        """The files that should hold them, each once."""
        return sorted(set(self._files.values()))

    @property
    def opened(self) -> Sequence[Path]:
        """The files of which a tensor was read."""
        return sorted(self._headers)

    def entry(self, name: str, dtypes: Sequence[str], shape: Sequence[int] | None = None) -> TensorEntry:
        """Where a tensor lies.

        Args: dtypes: those accepted; shape: the one expected, if known.
        Raises: AdapterError for a missing tensor or shard, a damaged file, another dtype, or another shape.
        """
        if name not in self._files:
            raise AdapterError(
                f"{self.path}: expected a tensor {name!r}, found none of that name among {len(self._files)}"
            )
        file = self._files[name]
        try:
            if file not in self._headers:
                self._headers[file] = read_header(file)
        except TableError as error:
            raise AdapterError(f"{error} (needed for {name!r})") from None
        if name not in self._headers[file]:
            raise AdapterError(f"{file}: the index promises {name!r}, the file does not hold it")
        entry = self._headers[file][name]
        if entry.dtype not in dtypes:
            raise AdapterError(f"{file}: {name}: expected dtype {' or '.join(dtypes)}, found {entry.dtype}")
        if shape is not None and entry.shape != tuple(shape):
            raise AdapterError(f"{file}: {name}: expected shape {list(shape)}, found {list(entry.shape)}")
        return entry

    def floats(self, name: str, shape: Sequence[int] | None = None) -> Float[Tensor, "*any"]:
        """A tensor of an ordinary float type in float32.

        Raises: AdapterError, also for a value that is not finite.
        """
        return self._finite(self._raw(self.entry(name, FLOATS, shape)).float(), name)

    def integers(self, name: str, shape: Sequence[int] | None = None) -> Shaped[Tensor, "*any"]:
        """An int64 tensor."""
        return self._raw(self.entry(name, ("I64",), shape))

    def dequantised(self, name: str, scale: str, shape: tuple[int, int], block: int) -> Float[Tensor, "out mem"]:
        """An FP8 E4M3 matrix times its E8M0 scales of `block` x `block`, in float32."""
        weight = self._raw(self.entry(name, ("F8_E4M3",), shape)).float()
        blocks = tuple(-(-size // block) for size in shape)
        exponents = self._bytes(self.entry(scale, ("F8_E8M0",), blocks)).reshape(blocks)
        factors = np.where(exponents == 255, np.nan, np.exp2(exponents.astype(np.float32) - 127)).astype(np.float32)
        for row, of_row in enumerate(torch.from_numpy(factors)):  # in place: the matrix may be most of a small memory
            spread = of_row.repeat_interleave(block)[: shape[1]]
            weight[row * block : (row + 1) * block] *= spread
        return self._finite(weight, name)

    def _raw(self, entry: TensorEntry) -> Tensor:
        return torch.from_numpy(self._bytes(entry)).view(_TORCH_DTYPES[entry.dtype]).reshape(entry.shape)

    def _bytes(self, entry: TensorEntry) -> np.ndarray:
        with entry.path.open("rb") as file:
            file.seek(entry.start)
            raw = np.frombuffer(bytearray(file.read(entry.stop - entry.start)), dtype=np.uint8)
        if raw.size != entry.stop - entry.start:
            raise AdapterError(
                f"{entry.path}: {entry.name}: expected {entry.stop - entry.start} bytes, found {raw.size}"
            )
        return raw

    def _finite(self, tensor: Tensor, name: str) -> Tensor:
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{self._files[name]}: {name} holds values that are not finite")
        return tensor


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file of sensible size.

    Raises: AdapterError when it is missing or not an object.
    """
    if not path.is_file():
        raise AdapterError(f"{path}: no such file")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterError(f"{path}: expected at most {MAX_CONFIG_BYTES} bytes, found {path.stat().st_size}")
    try:
        return parse_object(path.read_bytes(), path)
    except TableError as error:
        raise AdapterError(str(error)) from None


def read_config(kind: type[Config], values: dict[str, object], path: Path) -> Config:
    """Check a foreign configuration.

    Raises: AdapterError naming each missing or ill-typed key.
    """
    try:
        return kind.model_validate_json(json.dumps(values))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or CONFIG}: {e['msg']}" for e in error.errors())
        raise AdapterError(f"{path}: {problems}") from None


def fingerprint(files: Sequence[Path]) -> str:
    """SHA-256 over the files: all bytes up to 4 GiB in total; beyond, `sampled:` and the hash of sizes, first and last
    MiB.

    Files that are not there (shards nobody needs) count with their name alone.
    """
    present = [file for file in files if file.is_file()]
    sampled = sum(file.stat().st_size for file in present) > HASHED_BYTES
    digest = hashlib.sha256()
    for file in files:
        if len(files) > 1:
            digest.update(file.name.encode() + b"\0")
        if file not in present:
            continue
        with file.open("rb") as handle:
            if not sampled:
                while piece := handle.read(_SAMPLE):
                    digest.update(piece)
                continue
            size = file.stat().st_size
            digest.update(str(size).encode() + handle.read(_SAMPLE))
            handle.seek(max(0, size - _SAMPLE))
            digest.update(handle.read(_SAMPLE))
    return ("sampled:" if sampled else "") + digest.hexdigest()
