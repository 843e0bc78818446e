"""GGUF files of both published models hold the memories of the checkpoints they were made from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

gguf = pytest.importorskip("gguf")

from engram_interp.memory.gguf_rows import open_rows  # noqa: E402 - after the check for the package
from engram_interp.memory.row_reader import TableError  # noqa: E402
from engram_interp.models.adapters.deepseek_v41 import open_deepseek_v41  # noqa: E402
from engram_interp.models.adapters.gguf_memory import open_gguf_memory  # noqa: E402
from engram_interp.models.adapters.hooked import StandaloneMemory  # noqa: E402
from engram_interp.models.adapters.opening import kind_of, open_decoder, open_model  # noqa: E402
from engram_interp.models.adapters.qwen4_exp_memory import open_qwen4_exp_memory  # noqa: E402
from engram_interp.models.adapters.tensors import AdapterError  # noqa: E402
from engram_interp.models.check import check_model, run_check  # noqa: E402
from engram_interp.probes.memory_table import lookup, read_slot  # noqa: E402
from tests.foreign_checkpoints import EOS, SHAPES, qwen_config, qwen_host, write_checkpoint  # noqa: E402

KIND = gguf.GGMLQuantizationType
TEXT = "By the way, Alexander the Great was a king of Macedon."
Tensors = dict[str, tuple[np.ndarray, "KIND | None"]]


def write(path: Path, architecture: str, metadata: dict[str, object], tensors: Tensors) -> Path:
    """A GGUF file; integers are uint32, arrays of them uint64, as both converters write them."""
    writer, types = gguf.GGUFWriter(path, architecture), gguf.GGUFValueType
    for key, value in metadata.items():
        name = f"{architecture}.{key}"
        if isinstance(value, list):
            writer.add_key_value(name, value, types.ARRAY, types.UINT64)
        else:
            kind = {int: types.UINT32, float: types.FLOAT32, str: types.STRING}[type(value)]
            writer.add_key_value(name, value, kind)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def plain(tensor: torch.Tensor) -> tuple[np.ndarray, None]:
    return tensor.float().contiguous().numpy(), None


# -- Qwen ------------------------------------------------------------------------------------------------------------


def qwen_parts(host, seed: int = 1234) -> tuple[dict[str, object], Tensors]:
    """What llama.cpp's converter makes of a `Qwen4ExpForCausalLM`: 1 + w for the norms, the table in one piece."""
    config = host.config
    (block,) = [i for i, layer in enumerate(host.model.layers) if layer.ple is not None]
    ple = host.model.layers[block].ple
    embedding = ple.ple_embedding
    metadata = {
        "embedding_length": config.hidden_size, "hyper_connection.count": config.hc_count,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "embedding_length_per_layer_input": embedding.ngram_embedding.weight.shape[1],
        "ple.layers": [block], "ple.ngram_size": config.ngram_size, "ple.heads_per_ngram": config.heads_per_ngram,
        "ple.conv_kernel": config.ple_conv_kernel_size, "ple.eos_token_id": EOS, "ple.seed": seed,
        "ple.layer_multipliers": embedding.layer_multipliers.tolist(),
        "ple.head_offsets": embedding.ngram_heads_offsets.tolist(),
        "ple.head_vocab_sizes": embedding.ngram_heads_vocab_sizes.tolist(),
    }  # fmt: skip
    name = f"blk.{block}.ple_"
    tensors = {
        "token_embd.weight": plain(host.model.embed_tokens.weight), "output.weight": plain(host.lm_head.weight),
        "per_layer_token_embd.weight": plain(embedding.ngram_embedding.weight),
        f"{name}key.weight": plain(ple.key_proj.weight), f"{name}value.weight": plain(ple.value_proj.weight),
        f"{name}norm_key.weight": plain(1 + ple.norm_key.weight),
        f"{name}norm_query.weight": plain(1 + ple.norm_query.weight),
        f"{name}norm_conv.weight": plain(1 + ple.norm_conv.weight),
        f"{name}conv1d.weight": plain(ple.conv1d.weight.squeeze(1)),
    }  # fmt: skip
    return metadata, tensors


@pytest.fixture(scope="module")
def qwen(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model.gguf` beside the checkpoint it was made from."""
    directory = tmp_path_factory.mktemp("qwen")
    host = qwen_host(tokenizer.get_vocab_size())
    host.save_pretrained(directory)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    write(directory / "model.gguf", "qwen4exp", *qwen_parts(host))
    return directory


def same_memory(first: StandaloneMemory, second: StandaloneMemory, atol: float = 0.0) -> None:
    """Equal addresses, and equal gates and writes for equal streams."""
    tokens = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    assert first.engram_layers == second.engram_layers
    for site in first.sites:
        hidden = torch.randn(2, 9, site.branches, site.width, generator=torch.Generator().manual_seed(2))
        (out, cache), (other, other_cache) = (m.run_with_cache(tokens, {site.block: hidden}) for m in (first, second))
        assert torch.equal(
            cache[f"blocks.{site.block}.engram.hook_slots"], other_cache[f"blocks.{site.block}.engram.hook_slots"]
        )
        torch.testing.assert_close(out[site.block], other[site.block], atol=atol, rtol=atol)
        assert cache[f"blocks.{site.block}.engram.hook_gate"].std() > 0.01


@pytest.mark.parametrize("resident_bytes", [2**30, 0])
def test_a_qwen_file_holds_the_checkpoints_memory(qwen: Path, resident_bytes: int) -> None:
    assert kind_of(qwen / "model.gguf") == "gguf"
    memory = open_gguf_memory(qwen / "model.gguf", resident_bytes=resident_bytes)
    same_memory(memory, open_qwen4_exp_memory(qwen))
    report = check_model(memory)
    assert report.ok, [row for row in report.rows if not row.ok]
    assert {"blocks.1 multipliers stored", "blocks.1 primes stored", "blocks.1 offsets stored"} <= {
        row.check for row in report.rows
    }


def test_the_whole_model_reads_and_promotes_the_same(qwen: Path) -> None:
    """Lookup and `read --vocab` give the same from GGUF, from raw shards, and from transformers' running model."""
    models = [open_model(qwen / "model.gguf"), open_model(qwen, memory_only=True), open_model(qwen)]
    looked_up = [[(n.ngram, n.addresses, n.norms) for n in lookup(model, TEXT).ngrams] for model in models]
    assert looked_up[0] == looked_up[1] == looked_up[2]
    row = looked_up[0][5][1][2].row
    readings = [read_slot(model, row) for model in models]
    for reading in readings:
        assert [t.token_id for t in reading.promoted] == [t.token_id for t in readings[0].promoted]
        assert reading.promoted[0].logit == pytest.approx(readings[0].promoted[0].logit, rel=1e-4)


def test_quantised_tensors_are_read_as_the_package_dequantises_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    metadata, tensors = qwen_parts(qwen_host(tokenizer.get_vocab_size(), ple_embed_dim=256))
    for name in ("per_layer_token_embd.weight", "blk.1.ple_key.weight", "blk.1.ple_value.weight"):
        tensors[name] = gguf.quantize(tensors[name][0], KIND.Q8_0), KIND.Q8_0
    model = open_model(write(tmp_path / "m.gguf", "qwen4exp", metadata, tensors))
    assert model.tokenizer is None
    report = check_model(model)
    assert report.ok, [row for row in report.rows if not row.ok]
    expected = gguf.dequantize(tensors["blk.1.ple_value.weight"][0], KIND.Q8_0)
    assert np.array_equal(model.sites[0].value.weight.numpy(), expected)
    with pytest.raises(ValueError, match=r"without a tokenizer; put its tokenizer\.json beside it"):
        lookup(model, TEXT)
    with pytest.raises(ValueError, match="without a tokenizer"):
        read_slot(model, 3)


# -- DeepSeek --------------------------------------------------------------------------------------------------------


def v41_parts(
    shape: dict, raw: dict[str, torch.Tensor], memory: StandaloneMemory, dialect: str
) -> tuple[dict, Tensors]:
    """A raw checkpoint as llama.cpp (dequantised tables) or ds4 (the original bytes in rows of I8) keeps it."""
    sites = {site.block: site for site in memory.sites}
    in_order = [sites[block] for block in shape["layer_ids"]]
    metadata: dict[str, object] = {
        "attention.layer_norm_rms_epsilon": 1e-20,
        "engram.layer_ids": shape["layer_ids"],
        "engram.multipliers": [m for site in in_order for m in site.multipliers],
        "engram.primes": [p for site in in_order for row in site.primes for p in row],
        "engram.token_map": memory.vocabulary.token_map.tolist(),
        "engram.pad_id": in_order[0].pad,
    }
    tensors: Tensors = {"output.weight": plain(raw["head.weight"])}
    for site in in_order:
        old, new = f"layers.{site.block}.engram.", f"blk.{site.block}.engram_"
        if dialect == "ds4":
            both = torch.cat([raw[f"{old}embed.{part}"].view(torch.uint8) for part in ("weight", "scale")], dim=1)
            tensors[f"{new}embd.weight"] = both.numpy().view(np.int8), None
            metadata["engram.encoding"] = f"e4m3_e8m0_32_row{both.shape[1]}"
        else:
            metadata["engram.offsets"] = [o for other in in_order for o in other.offsets]
            tensors[f"{new}embd.weight"] = site.rows.read(np.arange(site.rows.rows)), None
        wkv = torch.cat([key.weight for key in site.keys] + [site.value.weight])
        tensors |= {f"{new}wkv.weight": plain(wkv)}
        tensors |= {f"{new}{n}.weight": plain(raw[f"{old}{n}_weight"]) for n in "qk"}
    return metadata, tensors


@pytest.mark.parametrize("dialect", ["llama.cpp", "ds4"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_deepseek_file_holds_the_checkpoints_memories(
    name: str, dialect: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    raw = write_checkpoint(tmp_path, SHAPES[name], tokenizer)
    shards = open_deepseek_v41(tmp_path)
    path = write(tmp_path / "model.gguf", "deepseek41", *v41_parts(SHAPES[name], raw, shards, dialect))
    for resident_bytes in (2**30, 0):
        memory = open_gguf_memory(path, resident_bytes=resident_bytes)
        same_memory(memory, shards)
        report = check_model(memory)
        assert report.ok, [row for row in report.rows if not row.ok]
    assert [(n.ngram, n.norms) for n in lookup(memory, TEXT).ngrams] == [
        (n.ngram, n.norms) for n in lookup(shards, TEXT).ngrams
    ]
    ours, theirs = (read_slot(model, 5).promoted for model in (memory, shards))
    assert ours == theirs
    head = raw["head.weight"].float()
    reading = (
        memory.sites[0].rows.read(np.array([5]))
        @ memory.sites[0].value.weight[:, : memory.sites[0].head_width].numpy().T
    )
    logits = torch.from_numpy(reading) @ head.T
    assert ours[0].token_id == int(logits.argmax())
    with pytest.raises(AdapterError, match="only the memories"):
        open_decoder(path)


def test_the_recorded_run_is_reproduced_from_gguf(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recording of the raw shards, against a GGUF file of the same weights."""
    from safetensors.torch import load_file

    folder = shared / "vectors" / "deepseek_v41_a"
    raw = {"head.weight": torch.zeros(8192, 64)}
    for file in folder.glob("*.safetensors"):
        raw |= load_file(file)
    layers = json.loads((folder / "config.json").read_text())["engram_layer_ids"]
    path = write(
        tmp_path / "m.gguf", "deepseek41", *v41_parts({"layer_ids": layers}, raw, open_deepseek_v41(folder), "ds4")
    )
    assert run_check(path, recorded=folder / "recorded.npz") == 0
    assert "recorded L2.hidden_out: worst difference" in capsys.readouterr().out


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def v41(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Tensors]:
    directory = tmp_path_factory.mktemp("v41")
    raw = write_checkpoint(directory, SHAPES["toy"], tokenizer)
    return v41_parts(SHAPES["toy"], raw, open_deepseek_v41(directory), "ds4")


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("engram.pad_id", lambda old: 10**6, r"compressed engram\.pad_id below"),
        ("engram.token_map", lambda old: [1] * len(old), "onto the ids 0, 1, 2"),
        ("engram.multipliers", lambda old: old[:-1], "multipliers and primes for each"),
        ("engram.multipliers", lambda old: [2**62 + 1, *old[1:]], "no product overflows"),
        ("engram.primes", lambda old: [10**9, *old[1:]], "expected a table of"),
        ("engram.primes", lambda old: [0, *old[1:]], "at least 2 rows"),
        ("engram.primes", lambda old: None, r"key deepseek41\.engram\.primes, found none"),
        ("engram.layer_ids", lambda old: [old[0], 3], "no tensor 'blk.3"),
        ("engram.encoding", lambda old: "lloyd4_e5m3_32_r136", "expected an encoding"),
        ("engram.encoding", lambda old: "e4m3_e8m0_32_row264", r"shape \[rows, 264\]"),
        ("attention.layer_norm_rms_epsilon", lambda old: "small", r"expected a number in \(0, 1\)"),
    ],
)
def test_constants_that_lie_are_one_clear_error(
    v41: tuple[dict, Tensors], tmp_path: Path, key: str, change: Callable, message: str
) -> None:
    metadata = {k: v for k, v in (v41[0] | {key: change(v41[0][key])}).items() if v is not None}
    with pytest.raises(AdapterError, match=message):
        open_model(write(tmp_path / "m.gguf", "deepseek41", metadata, v41[1]))


def test_a_changed_constant_fails_its_check(v41: tuple[dict, Tensors], tmp_path: Path) -> None:
    """A file may hold constants of its own; they are used, and `check` says that they are not the published rule's."""
    metadata = v41[0] | {"engram.multipliers": [7, *v41[0]["engram.multipliers"][1:]]}
    report = check_model(open_model(write(tmp_path / "m.gguf", "deepseek41", metadata, v41[1])))
    assert [row.check for row in report.rows if not row.ok] == ["blocks.1 multipliers"]


def test_another_models_file_or_tokenizer_is_refused(
    v41: tuple[dict, Tensors], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write(tmp_path / "m.gguf", "deepseek41", *v41)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    assert open_model(path).tokenizer is not None
    swapped = json.loads(tokenizer.to_str())
    swapped["model"]["merges"] = swapped["model"]["merges"][:-1]
    vocabulary = sorted(swapped["model"]["vocab"].items(), key=lambda item: item[1])
    swapped["model"]["vocab"] = dict(vocabulary[:-1])
    (tmp_path / "tokenizer.json").write_text(json.dumps(swapped), encoding="utf-8")
    with pytest.raises(AdapterError, match=r"to compress as engram\.token_map does"):
        open_model(path)
    with pytest.raises(AdapterError, match="found 'llama', which has no memory"):
        open_model(write(tmp_path / "other.gguf", "llama", {}, {"t": plain(torch.ones(1, 4))}))
    with pytest.raises(AdapterError, match=r"m\.gguf"):
        os.truncate(path, 2000)
        open_model(path)


def test_a_prime_beyond_any_table_is_compared_with_the_table_first(v41: tuple[dict, Tensors], tmp_path: Path) -> None:
    metadata, tensors = v41
    primes = [2**56 + 1, *metadata["engram.primes"][1:]]
    with pytest.raises(
        AdapterError, match=r"expected a table of \[720575940379\d+, 32\] by the configuration, found \["
    ):
        open_model(write(tmp_path / "m.gguf", "deepseek41", metadata | {"engram.primes": primes}, tensors))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_raise_adapter_errors_only(
    v41: tuple[dict, Tensors], tmp_path: Path, data: st.DataObject
) -> None:
    """Bytes of header and constants changed at random: a clear error, or a model that still runs."""
    path = tmp_path / "m.gguf"
    if not path.is_file():
        write(path, "deepseek41", *v41)
    whole = bytearray(path.read_bytes())
    header_end = whole.find(b"blk.2.engram_k.weight") + 60
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, header_end))
        value = data.draw(st.binary(min_size=1, max_size=8))
        whole[position : position + len(value)] = value
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(whole)
    try:
        model = open_model(damaged)
    except AdapterError:
        return
    block = model.engram_layers[0]
    hidden = torch.zeros(1, 3, model.sites[0].branches, model.sites[0].width)
    assert model(torch.tensor([[0, 1, 2]]), {block: hidden})[block].shape == hidden.shape


def test_packed_rows_decode_as_torch_does(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 255, (6, 66)).astype(np.uint8)
    path = write(
        tmp_path / "m.gguf", "deepseek41", {"engram.encoding": "e4m3_e8m0_32_row66"},
        {"blk.0.engram_embd.weight": (codes.view(np.int8), None)},
    )  # fmt: skip
    reader = open_rows(path)
    values = torch.from_numpy(codes[:, :64].copy()).view(torch.float8_e4m3fn).float()
    scales = torch.from_numpy(codes[:, 64:].copy()).view(torch.float8_e8m0fnu).float().repeat_interleave(32, 1)
    assert (reader.rows, reader.width) == (6, 64)
    assert np.array_equal(reader.read(np.array([4, 0])), (values * scales)[[4, 0]].numpy(), equal_nan=True)
    assert reader.read(np.array([], dtype=np.int64)).shape == (0, 64)
    for encoding in ("e4m3_e8m0_32_row65", "e4m3_e8m0_0_row66", "e4m3_e8m0_31_row66"):
        bad = write(
            tmp_path / "bad.gguf", "deepseek41", {"engram.encoding": encoding},
            {"blk.0.engram_embd.weight": (codes.view(np.int8), None)},
        )  # fmt: skip
        with pytest.raises(TableError, match="expected"):
            open_rows(bad)


def test_a_missing_package_is_named(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(AdapterError, match=r"install engram-interp\[formats\]"):
        open_model(qwen / "model.gguf")


def test_published_constants_are_regenerated() -> None:
    """What the two published files ship, from the rules `check` regenerates them by."""
    from engram_interp.memory import assign_primes, pcg64_multipliers

    assert pcg64_multipliers(0, 14, 99092, 4) == (67716810739261, 51510806800915, 30921347202721, 82619226485591)
    primes = [p for layer in assign_primes([16000057] * 3, 8, 2) for row in layer for p in row]
    assert (primes[0], primes[23], primes[24], primes[47]) == (16000057, 16000463, 16000477, 16000889)
    assert (sum(primes[:24]), sum(primes[24:])) == (384006168, 384016682)
    assert qwen_config(300).seed == 1234
