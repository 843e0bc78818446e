"""Rows read from GGUF equal the gguf package's own dequantisation of the whole tensor; damage is one clear error."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

gguf = pytest.importorskip("gguf")

from engram_interp.memory.gguf_header import read_gguf_header  # noqa: E402 - after the check for the package
from engram_interp.memory.gguf_rows import GgufFile, open_rows  # noqa: E402
from engram_interp.memory.row_reader import RowIndexError, TableError  # noqa: E402

TABLE = "per_layer_token_embd.weight"
KIND = gguf.GGMLQuantizationType


def write_gguf(path: Path, tensors: dict[str, np.ndarray], kinds: dict[str, KIND] | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "qwen4exp")
    writer.add_array("qwen4exp.ple.layers", [1])
    multipliers = [23703573157769, 20109073645365, 8052911324071]
    value_type = gguf.GGUFValueType
    writer.add_key_value("qwen4exp.ple.multipliers", multipliers, value_type.ARRAY, value_type.INT64)
    writer.add_uint32("qwen4exp.ple.heads", 8)
    writer.add_array("tokenizer.ggml.tokens", ["<bos>", "the", "\u0120cat"])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def weight() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(10, 256)).astype(np.float32)


QUANTISED = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16"]


@pytest.mark.parametrize("kind", [*QUANTISED, "F32", "F16"])
def test_single_rows_equal_the_whole_tensor_dequantised(tmp_path: Path, weight: np.ndarray, kind: str) -> None:
    stored = weight.astype(np.float16) if kind == "F16" else weight
    if kind in QUANTISED:
        stored = gguf.quantize(weight, KIND[kind])
    path = write_gguf(tmp_path / "m.gguf", {"blk.1.ple_key.weight": weight[:3], TABLE: stored}, {TABLE: KIND[kind]})
    reader = open_rows(path)
    assert (reader.rows, reader.width, reader.name) == (10, 256, TABLE)
    whole = next(t for t in gguf.GGUFReader(path).tensors if t.name == TABLE)
    expected = gguf.dequantize(whole.data, whole.tensor_type)
    indices = np.array([7, 0, 0, 9])
    assert np.array_equal(reader.read(indices), expected[indices])
    assert np.array_equal(reader.read(np.arange(10)), expected)
    assert np.abs(expected - weight).max() < 0.5  # it is the table that was stored
    assert reader.read(np.array([], dtype=np.int64)).shape == (0, 256)
    with pytest.raises(RowIndexError, match=r"\[0, 10\), found 10"):
        reader.read(np.array([10]))


def test_metadata_and_small_tensors_read_as_written(tmp_path: Path, weight: np.ndarray) -> None:
    file = GgufFile(
        write_gguf(tmp_path / "m.gguf", {"blk.1.ple_key.weight": weight, "blk.1.ple_norm.weight": weight[0]})
    )
    assert file.metadata["qwen4exp.ple.multipliers"].tolist() == [23703573157769, 20109073645365, 8052911324071]
    assert file.metadata["qwen4exp.ple.heads"] == 8
    assert file.metadata["tokenizer.ggml.tokens"] == ["<bos>", "the", "\u0120cat"]
    assert file.metadata["general.architecture"] == "qwen4exp"
    assert np.array_equal(file.tensor("blk.1.ple_key.weight"), weight)
    assert np.array_equal(file.tensor("blk.1.ple_norm.weight"), weight[0])
    with pytest.raises(TableError, match="none among 2"):
        file.rows()
    with pytest.raises(TableError, match="no tensor 'x'"):
        file.rows("x")
    with pytest.raises(TableError, match=r"\[rows, width\]"):
        file.rows("blk.1.ple_norm.weight")


def test_split_files_open_as_one(tmp_path: Path, weight: np.ndarray) -> None:
    first = write_gguf(tmp_path / "m-00001-of-00002.gguf", {"blk.1.ple_key.weight": weight[:2]})
    second = write_gguf(tmp_path / "m-00002-of-00002.gguf", {TABLE: weight})
    assert np.array_equal(open_rows(first).read(np.array([4])), weight[4:5])
    second.unlink()
    with pytest.raises(TableError, match="m-00002-of-00002.gguf: no such file"):
        open_rows(first)


def test_a_truncated_file_names_the_tensor(tmp_path: Path, weight: np.ndarray) -> None:
    path = write_gguf(tmp_path / "m.gguf", {TABLE: weight})
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(TableError, match="per_layer_token_embd"):
        open_rows(path)


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def info(name: bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    numbers = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return struct.pack("<Q", len(name)) + name + numbers


def head(tensors: int = 0, pairs: int = 0, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", magic, version, tensors, pairs)


BAD = {
    "empty": b"",
    "magic": head(magic=b"GGML"),
    "version": head(version=9),
    "big-endian": head(version=3 << 24),
    "2^60 pairs": head(pairs=2**60),
    "2^60 tensors": head(tensors=2**60),
    "2^60 numbers": head(pairs=1) + pair(b"k", 9, struct.pack("<IQ", 4, 2**60)),
    "2^60 strings": head(pairs=1) + pair(b"k", 9, struct.pack("<IQ", 8, 2**60)),
    "long string": head(pairs=1) + struct.pack("<Q", 2**63),
    "not UTF-8": head(pairs=1) + pair(b"\xff", 4, bytes(4)),
    "array of arrays": head(pairs=1) + pair(b"k", 9, struct.pack("<IQ", 9, 1) + bytes(99)),
    "value type": head(pairs=1) + pair(b"k", 77, bytes(8)),
    "twice": head(pairs=2) + pair(b"k", 4, bytes(4)) * 2,
    "alignment": head(pairs=1) + pair(b"general.alignment", 4, struct.pack("<I", 0)),
    "outside": head(tensors=1) + info(b"t", (32, 2**40), 0, 0) + bytes(200),
    "overflow": head(tensors=1) + info(b"t", (2**63, 2**63), 0, 0) + bytes(200),
    "offset": head(tensors=1) + info(b"t", (1,), 0, 2**63) + bytes(200),
    "misaligned": head(tensors=1) + info(b"t", (1,), 0, 3) + bytes(200),
    "part of a block": head(tensors=1) + info(b"t", (33, 1), 8, 0) + bytes(200),
    "type": head(tensors=1) + info(b"t", (32, 1), 999, 0) + bytes(200),
    "dimensions": head(tensors=1) + info(b"t", (1,) * 9, 0, 0) + bytes(200),
    "overlap": head(tensors=2) + info(b"a", (16,), 0, 0) + info(b"b", (16,), 0, 32) + bytes(200),
    "same name": head(tensors=2) + info(b"a", (8,), 0, 0) + info(b"a", (8,), 0, 32) + bytes(200),
}


@pytest.mark.parametrize("case", BAD)
def test_a_lying_header_is_one_clear_error(tmp_path: Path, case: str) -> None:
    (tmp_path / "m.gguf").write_bytes(BAD[case])
    with pytest.raises(TableError, match=r"m\.gguf"):
        read_gguf_header(tmp_path / "m.gguf")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_raise_table_errors_only(tmp_path: Path, data: st.DataObject) -> None:
    tensors = info(b"per_layer_token_embd.weight", (32, 4), 8, 0) + info(b"b", (16,), 0, 160)
    whole = bytearray(head(2, 2) + pair(b"general.alignment", 4, struct.pack("<I", 32)))
    whole += pair(b"k", 9, struct.pack("<IQ", 8, 1) + struct.pack("<Q", 2) + b"ab") + tensors
    header_end = len(whole)
    whole += bytes(-len(whole) % 32 + 224)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, header_end))
        whole[position : position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = tmp_path / "m.gguf"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole))) if data.draw(st.booleans()) else None])
    try:
        reader = open_rows(path)
    except TableError:
        return
    assert reader.read(np.arange(min(reader.rows, 1000))).shape == (min(reader.rows, 1000), reader.width)
