"""Rows by byte offset equal the tensors safetensors loads, whatever the dtype and layout; damage is one clear error."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engram_interp.memory.in_memory_rows import InMemoryRows
from engram_interp.memory.row_reader import ConcatenatedRows, RowIndexError, TableError, chunks
from engram_interp.memory.safetensors_header import TensorFiles, read_header
from engram_interp.memory.safetensors_rows import open_safetensors_rows

INDICES = np.array([3, 0, 9, 9, 4], dtype=np.int64)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(10, 64, generator=torch.Generator().manual_seed(0))


def write_raw(path: Path, header: dict | bytes, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_in_memory_rows_are_the_weight(weight: torch.Tensor) -> None:
    rows = InMemoryRows(weight.bfloat16())
    assert np.array_equal(rows.read(INDICES), weight.bfloat16().float()[INDICES].numpy())


@pytest.mark.parametrize("bad", [-1, 10])
def test_an_index_outside_is_refused_by_name(weight: torch.Tensor, tmp_path: Path, bad: int) -> None:
    save_file({"t": weight}, tmp_path / "a.safetensors")
    for reader in (InMemoryRows(weight), open_safetensors_rows(tmp_path / "a.safetensors", "t")):
        with pytest.raises(RowIndexError, match=rf"\[0, 10\), found {bad}"):
            reader.read(np.array([0, bad], dtype=np.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_dtype_reads_as_safetensors_does(weight: torch.Tensor, tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"other": torch.zeros(3), "t": weight.to(dtype)}, tmp_path / "a.safetensors")
    reader = open_safetensors_rows(tmp_path / "a.safetensors", "t")
    assert (reader.rows, reader.width, reader.name) == (10, 64, "t")
    assert np.array_equal(reader.read(INDICES), weight.to(dtype).float()[INDICES].numpy())
    assert np.array_equal(reader.read(np.arange(2, 7)), weight.to(dtype).float()[2:7].numpy())
    assert reader.read(np.array([], dtype=np.int64)).shape == (0, 64)


def test_every_fp8_code_decodes_as_torch_does(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(8, 32)
    scales = torch.tensor([0, 1, 100, 126, 127, 128, 200, 254], dtype=torch.uint8).reshape(8, 1)
    tensors = {"e.weight": codes.view(torch.float8_e4m3fn), "e.scale": scales.view(torch.float8_e8m0fnu)}
    save_file(tensors, tmp_path / "a.safetensors")
    found = open_safetensors_rows(tmp_path / "a.safetensors", "e.weight").read(np.arange(8))
    expected = tensors["e.weight"].float() * tensors["e.scale"].float()
    assert np.array_equal(found, expected.numpy(), equal_nan=True)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float8_e8m0fnu])
def test_fp8_blocks_take_their_own_scales(weight: torch.Tensor, tmp_path: Path, scale_dtype: torch.dtype) -> None:
    powers = torch.exp2(torch.arange(20).reshape(10, 2) - 9.0)
    tensors = {"e.weight": weight.to(torch.float8_e4m3fn), "e.scale": powers.to(scale_dtype)}
    save_file(tensors, tmp_path / "a.safetensors")
    found = open_safetensors_rows(tmp_path / "a.safetensors", "e.weight").read(INDICES)
    expected = tensors["e.weight"].float() * powers.repeat_interleave(32, dim=1)
    assert np.array_equal(found, expected[INDICES].numpy())


def test_fp8_without_or_with_ill_fitting_scales_is_refused(weight: torch.Tensor, tmp_path: Path) -> None:
    fp8 = weight.to(torch.float8_e4m3fn)
    save_file({"e.weight": fp8}, tmp_path / "none.safetensors")
    with pytest.raises(TableError, match="block scales"):
        open_safetensors_rows(tmp_path / "none.safetensors", "e.weight")
    for shape in ((9, 2), (10, 3)):
        save_file({"e.weight": fp8, "e.scale": torch.ones(shape)}, tmp_path / "bad.safetensors")
        with pytest.raises(TableError, match="expected scales"):
            open_safetensors_rows(tmp_path / "bad.safetensors", "e.weight")


def shard_directory(directory: Path, weight: torch.Tensor) -> str:
    """Four row shards over two files, with an index: 3, 3, 3 and 1 rows, 'shard_2' before 'shard_0'."""
    name = "model.ple_embedding.ngram_embedding.shard_{}.weight"
    parts = [part.clone() for part in weight.bfloat16().split(3)]
    save_file({name.format(2): parts[2], name.format(0): parts[0]}, directory / "model-1.safetensors")
    save_file({name.format(1): parts[1], name.format(3): parts[3]}, directory / "model-2.safetensors")
    files = {name.format(i): f"model-{1 + i % 2}.safetensors" for i in range(4)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return name.format("*")


def test_shards_of_one_table_join_along_rows(weight: torch.Tensor, tmp_path: Path) -> None:
    name = shard_directory(tmp_path, weight)
    expected = weight.bfloat16().float().numpy()
    for path, asked in ((tmp_path, name), (tmp_path, None), (tmp_path / "model.safetensors.index.json", None)):
        reader = open_safetensors_rows(path, asked)
        assert isinstance(reader, ConcatenatedRows)
        assert (reader.rows, reader.name) == (10, name)
        assert np.array_equal(reader.read(INDICES), expected[INDICES])
    streamed = np.concatenate([rows for _, rows in chunks(open_safetensors_rows(tmp_path), 1, 9, chunk=2)])
    assert np.array_equal(streamed, expected[1:9])
    (tmp_path / "model.safetensors.index.json").unlink()
    assert np.array_equal(open_safetensors_rows(tmp_path).read(INDICES), expected[INDICES])


def test_a_missing_shard_file_or_number_is_named(weight: torch.Tensor, tmp_path: Path) -> None:
    shard_directory(tmp_path, weight)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(TableError, match=r"model-2.safetensors: no such file"):
        open_safetensors_rows(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(TableError, match="shard 1 is missing"):
        open_safetensors_rows(tmp_path)


def test_published_layout_reads_as_the_recorded_run_used_it() -> None:
    directory = Path(__file__).resolve().parents[2] / "shared" / "vectors" / "deepseek_v41_a"
    if not directory.is_dir():
        pytest.skip("shared/vectors/deepseek_v41_a is absent")
    from safetensors import safe_open

    with pytest.raises(TableError, match=r"layers\.1\.engram.*layers\.2\.engram"):
        open_safetensors_rows(directory)
    reader = open_safetensors_rows(directory, "layers.2.engram.embed.weight")
    with safe_open(directory / "model-00004-of-00004.safetensors", "pt") as file:
        weight = file.get_tensor("layers.2.engram.embed.weight").float()
        scale = file.get_tensor("layers.2.engram.embed.scale").float()
    assert np.array_equal(reader.read(np.arange(reader.rows)), (weight * scale).numpy())


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/x.safetensors", "a\\x.safetensors", "x.bin", "..", 3, "C:x.safetensors"]
)
def test_an_index_may_only_name_files_beside_it(tmp_path: Path, file: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t": file}}))
    with pytest.raises(TableError, match=r"plain \*.safetensors file name"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("index", [b"", b"[]", b"{}", b'{"weight_map": []}', b"\xff", b"[" * 100_000])
def test_a_damaged_index_is_one_clear_error(tmp_path: Path, index: bytes) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(TableError, match="expected"):
        TensorFiles(tmp_path)


def test_an_index_that_promises_too_much_is_refused(weight: torch.Tensor, tmp_path: Path) -> None:
    save_file({"t": weight}, tmp_path / "m.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"other": "m.safetensors"}}))
    with pytest.raises(TableError, match="promises 'other'"):
        open_safetensors_rows(tmp_path, "other")


BAD_HEADERS = {
    "short file": (b"", {"length": 2}),
    "claims more than the file": ({"t": entry("F32", [2, 2], 0, 16)}, {"length": 10**6, "data": bytes(16)}),
    "huge length": (b"{}", {"length": 2**63}),
    "not JSON": (b"{nope}", {}),
    "list": (b"[]", {}),
    "deep": (b"[" * 50_000, {}),
    "long number": (b'{"t":' + b"9" * 5000 + b"}", {}),
    "truncated data": ({"t": entry("F32", [2, 2], 0, 16)}, {"data": bytes(15)}),
    "trailing data": ({"t": entry("F32", [2, 2], 0, 16)}, {"data": bytes(17)}),
    "size against shape": ({"t": entry("F32", [2, 3], 0, 16)}, {"data": bytes(16)}),
    "descending": ({"t": entry("F32", [0, 2], 16, 0)}, {"data": bytes(16)}),
    "negative": ({"t": entry("F32", [2, 2], -16, 0)}, {"data": bytes(16)}),
    "negative shape": ({"t": entry("F32", [-2, -2], 0, 16)}, {"data": bytes(16)}),
    "boolean shape": ({"t": entry("U8", [True, 16], 0, 16)}, {"data": bytes(16)}),
    "float offsets": ({"t": {**entry("F32", [2, 2], 0, 16), "data_offsets": [0.0, 16.0]}}, {"data": bytes(16)}),
    "overflowing shape": ({"t": entry("U8", [2**40, 2**40], 0, 0)}, {}),
    "overlap": ({"a": entry("U8", [16], 0, 16), "b": entry("U8", [8], 8, 16)}, {"data": bytes(16)}),
    "hole": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [8], 8, 16)}, {"data": bytes(16)}),
    "unknown dtype": ({"t": entry("Q3", [16], 0, 16)}, {"data": bytes(16)}),
    "no shape": ({"t": {"dtype": "F32", "data_offsets": [0, 0]}}, {}),
    "entry is a list": ({"t": [1]}, {}),
    "duplicate": (
        b'{"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        {},
    ),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_lying_header_is_one_clear_error(tmp_path: Path, case: str) -> None:
    header, rest = BAD_HEADERS[case]
    with pytest.raises(TableError, match=r"a\.safetensors"):
        read_header(write_raw(tmp_path / "a.safetensors", header, **rest))


@pytest.mark.parametrize(("dtype", "shape"), [("I32", [2, 2]), ("F32", [4]), ("F32", [2, 2, 1])])
def test_a_tensor_that_is_no_table_is_refused(tmp_path: Path, dtype: str, shape: list[int]) -> None:
    path = write_raw(tmp_path / "a.safetensors", {"t": entry(dtype, shape, 0, 16)}, bytes(16))
    with pytest.raises(TableError, match="expected"):
        open_safetensors_rows(path, "t")


def test_a_file_cut_after_opening_is_an_error_not_a_crash(weight: torch.Tensor, tmp_path: Path) -> None:
    save_file({"t": weight}, tmp_path / "a.safetensors")
    reader = open_safetensors_rows(tmp_path / "a.safetensors", "t")
    os.truncate(tmp_path / "a.safetensors", 200)
    with pytest.raises(TableError, match="expected at least"):
        reader.read(INDICES)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_raise_table_errors_only(tmp_path: Path, data: st.DataObject) -> None:
    header = {"e.weight": entry("F8_E4M3", [4, 32], 0, 128), "e.scale": entry("F8_E8M0", [4, 1], 128, 132)}
    raw = json.dumps(header).encode()
    whole = bytearray(struct.pack("<Q", len(raw)) + raw + bytes(132))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(raw) + 12))
        whole[position : position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = tmp_path / "a.safetensors"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole))) if data.draw(st.booleans()) else None])
    try:
        reader = open_safetensors_rows(path, "e.weight")
    except TableError:
        return
    assert reader.read(np.arange(reader.rows)).shape == (reader.rows, reader.width)


SPARSE_ROWS, SPARSE_WIDTH = 713_000_000, 256  # 190 GB with the scales

SPARSE_PROGRAM = """
import resource, sys, time
import numpy as np
from pathlib import Path
from engram_interp.memory.safetensors_rows import open_safetensors_rows
reader = open_safetensors_rows(Path(sys.argv[1]), "layers.1.engram.embed.weight")
rows = np.random.default_rng(0).integers(0, reader.rows, 10_000)
rows[0] = reader.rows - 1
before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024
start, work = time.perf_counter(), time.process_time()
values = reader.read(rows)
seconds, work = time.perf_counter() - start, time.process_time() - work
# VmHWM, not ru_maxrss: the latter still counts the process that started this one.
after = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
table = np.zeros((500_000, reader.width), np.float32)
chosen = rows % len(table)
start = time.perf_counter()
for _ in range(20):
    table[chosen]
in_memory = (time.perf_counter() - start) / 20
print(seconds, work, in_memory, before, after, values[0, :3].tolist(), np.count_nonzero(values))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads resident memory from /proc")
def test_ten_thousand_rows_of_a_190_gb_file_cost_almost_nothing(tmp_path: Path) -> None:
    scales = SPARSE_ROWS * SPARSE_WIDTH
    end = scales + SPARSE_ROWS * 8
    header = {
        "layers.1.engram.embed.weight": entry("F8_E4M3", [SPARSE_ROWS, SPARSE_WIDTH], 0, scales),
        "layers.1.engram.embed.scale": entry("F8_E8M0", [SPARSE_ROWS, 8], scales, end),
    }
    path = write_raw(tmp_path / "table.safetensors", header)
    data_start = path.stat().st_size
    try:
        with path.open("r+b") as file:
            file.truncate(data_start + end)
            file.seek(data_start + scales - SPARSE_WIDTH)
            file.write(bytes([0x38, 0x40, 0xB8]))  # 1, 2, -1 in the last row
            file.seek(data_start + end - 8)
            file.write(bytes([129]))  # times 4
    except OSError as error:
        pytest.skip(f"this file system holds no sparse 190 GB file ({error.strerror})")
    if path.stat().st_blocks * 512 > 10**8:
        pytest.skip("this file system has no sparse files")
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", SPARSE_PROGRAM, str(path)], cwd=root, capture_output=True, text=True, check=True
    )
    seconds, work, in_memory, before, after = map(float, done.stdout.split()[:5])
    print(f"10,000 rows: {seconds:.3f} s, of which {work:.3f} s of this process; in memory {in_memory:.4f} s")
    print(f"{(after - before) / 1024:.0f} MB grown, peak {after / 1024:.0f} MB")
    assert "[4.0, 8.0, -4.0] 3" in done.stdout
    assert after * 1024 < 300e6  # the whole process
    assert (after - before) * 1024 < 150e6  # pages of 10,000 rows and scales: 82 MB; results 10 MB, thrice
    assert work < 2.0  # of this process, so that a busy machine does not decide
    assert seconds < 2000 * in_memory  # an in-memory gather takes about a millisecond
