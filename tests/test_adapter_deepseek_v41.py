"""Raw DeepSeek-V4.1 shards: a writer of the layout, an independent forward, and ways such a folder can be wrong."""

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
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from engram_interp.memory import Engram, assign_primes
from engram_interp.models.adapters.assemble import StoredTable
from engram_interp.models.adapters.deepseek_v41 import open_deepseek_v41
from engram_interp.models.adapters.hooked import StandaloneMemory
from engram_interp.models.adapters.opening import kind_of, open_model
from engram_interp.models.adapters.tensors import AdapterError, fingerprint
from engram_interp.models.check import check_model, run_check
from engram_interp.models.site import sites_of
from tests.foreign_checkpoints import SHAPES, write_checkpoint


def plain_forward(
    tensors: dict[str, torch.Tensor], prefix: str, slots: torch.Tensor, offsets: tuple[int, ...], hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h + Y, gate) by the published formula, in float64, product of the two gains first as the release does."""
    as_float = lambda name: tensors[prefix + name].to(torch.float32).double()  # noqa: E731
    table = as_float("embed.weight")
    scale = as_float("embed.scale").repeat_interleave(32, 1)[:, : table.shape[1]]
    wkv = as_float("wkv.weight")
    wkv_scale = as_float("wkv.scale").repeat_interleave(32, 0).repeat_interleave(32, 1)[: wkv.shape[0], : wkv.shape[1]]
    m, d = hidden.shape[2:]
    memory = (table * scale)[slots + torch.tensor(offsets)].flatten(-2)
    key, value = (memory @ (wkv * wkv_scale).T).split([m * d, d], dim=-1)
    key, h = key.unflatten(-1, (m, d)), hidden.double()
    scale = torch.rsqrt(h.square().mean(-1) + 1e-20) * torch.rsqrt(key.square().mean(-1) + 1e-20)
    dot = (h * (as_float("q_weight") * as_float("k_weight")) * key).sum(-1) * scale * d**-0.5
    gate = torch.sigmoid(torch.copysign(dot.abs().clamp_min(1e-6).sqrt(), dot))
    return h + gate[..., None] * value[:, :, None], gate


@pytest.fixture(scope="module")
def toy(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("v41")
    write_checkpoint(directory, SHAPES["toy"], tokenizer)
    return directory


@pytest.fixture
def damaged(toy: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the toy checkpoint with other configuration keys, to be damaged further."""

    def copy(**config: object) -> Path:
        for path in toy.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        values = json.loads((toy / "config.json").read_text()) | config
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    return copy


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("resident_bytes", [2**30, 0])
def test_forward_equals_the_published_formula(
    name: str, resident_bytes: int, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Loaded or left in its file, the table gives the same gates and writes."""
    tensors = write_checkpoint(tmp_path, SHAPES[name], tokenizer)
    model = open_deepseek_v41(tmp_path, resident_bytes=resident_bytes)
    tokens = torch.randint(3, tokenizer.get_vocab_size(), (2, 9), generator=torch.Generator().manual_seed(1))
    for site in sites_of(model):
        assert isinstance(site.engram.table, StoredTable) == (resident_bytes == 0)
        shape = (*tokens.shape, site.branches, site.width)
        hidden = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        out, cache = model.run_with_cache(tokens, {site.block: hidden})
        slots = cache[f"blocks.{site.block}.engram.hook_slots"]
        expected, gate = plain_forward(tensors, f"layers.{site.block}.engram.", slots, site.offsets, hidden)
        torch.testing.assert_close(cache[f"blocks.{site.block}.engram.hook_gate"].double(), gate, atol=1e-5, rtol=0)
        torch.testing.assert_close(out[site.block].double(), expected, atol=1e-4, rtol=1e-5)
    report = check_model(model)
    assert report.ok, [row for row in report.rows if not row.ok]


def test_the_recorded_run_is_reproduced(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = shared / "vectors" / "deepseek_v41_a"
    assert run_check(str(directory), recorded=directory / "recorded.npz") == 0
    out = capsys.readouterr().out
    assert "recorded L2.hidden_out" in out
    assert "WRONG" not in out


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_size_of_the_layout_passes(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Random orders, heads, streams, layers, widths and rows: every check holds, and the formula gives the write."""
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    shape = {
        "width": draw(1, 70), "hc_mult": draw(1, 5), "max_order": draw(2, 4), "heads": draw(1, 4),
        "layer_ids": data.draw(st.permutations(range(4)).map(lambda order: order[: 1 + order[0] % 3])),
        "head_dim": data.draw(st.sampled_from([1, 3, 16, 32, 64, 96])), "rows": draw(20, 300),
    }  # fmt: skip
    directory = tmp_path_factory.mktemp("any")
    tensors = write_checkpoint(directory, shape, tokenizer, seed=draw(0, 99))
    model = open_deepseek_v41(directory, resident_bytes=draw(0, 1) * 2**30)
    report = check_model(model)
    assert report.ok, [row for row in report.rows if not row.ok]
    tokens = torch.randint(3, tokenizer.get_vocab_size(), (2, 6), generator=torch.Generator().manual_seed(1))
    for site in sites_of(model):
        hidden = torch.randn(2, 6, site.branches, site.width, generator=torch.Generator().manual_seed(2))
        out = model(tokens, {site.block: hidden})[site.block]
        prefix = f"layers.{site.block}.engram."
        expected, _ = plain_forward(tensors, prefix, site.engram.ngram_hash.slots(tokens), site.offsets, hidden)
        torch.testing.assert_close(out.double(), expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


def test_published_constants_of_the_release() -> None:
    """Rows, first and last primes and multipliers of DeepSeek-V4.1-Flash."""
    from engram_interp.memory import pcg64_multipliers

    layers = assign_primes([16_000_000] * 3, 8, 2)
    flat = [[prime for order in layer for prime in order] for layer in layers]
    assert [sum(primes) for primes in flat] == [384006168, 384016682]
    assert [(primes[0], primes[-1]) for primes in flat] == [(16000057, 16000463), (16000477, 16000889)]
    assert pcg64_multipliers(0, 1, 99092, 4) == (76632096046245, 4839876093313, 35959672319349, 73987337458391)
    assert pcg64_multipliers(0, 14, 99092, 4) == (67716810739261, 51510806800915, 30921347202721, 82619226485591)


def test_opened_by_kind_and_by_every_alias(toy: Path, damaged: Callable[..., Path]) -> None:
    assert kind_of(toy) == "deepseek_v41"
    model = open_model(toy)
    assert isinstance(model, StandaloneMemory)
    assert model.engram_layers == (1, 2)
    assert isinstance(model.engram(1), Engram)
    of_memories = [toy / f"model-0000{i}-of-00009.safetensors" for i in (2, 3)]  # the head is another shard
    assert model.identity.weights_sha256 == fingerprint(of_memories)
    other = damaged()
    config = json.loads((other / "config.json").read_text())
    aliases = {"hidden_size": "dim", "engram_pad_token_id": "engram_pad_id", "num_hidden_layers": "n_layers"}
    text = {aliases.get(key, key): value for key, value in config.items() if key != "model_type"}
    (other / "config.json").write_text(json.dumps(text))
    assert open_model(other).engram_layers == (1, 2)
    (other / "config.json").write_text(json.dumps({"model_type": "deepseek_v41", "text_config": config}))
    assert open_model(other).engram_layers == (1, 2)


def test_hooks_change_the_write_and_are_gone_afterwards(toy: Path) -> None:
    model = open_model(toy)
    tokens, hidden = torch.tensor([[5, 6, 7, 8]]), {1: torch.ones(1, 4, 4, 64)}
    before = model(tokens, hidden)[1]
    with model.hooks(fwd_hooks=[("blocks.1.engram.hook_gate", lambda gate, hook: torch.zeros_like(gate))]):
        assert torch.equal(model(tokens, hidden)[1], hidden[1])
    assert torch.equal(model(tokens, hidden)[1], before)
    with pytest.raises(ValueError, match="expected hidden states of shape"):
        model(tokens, {1: torch.ones(1, 4, 3, 64)})
    with pytest.raises(ValueError, match="block 0 has no memory"):
        model(tokens, {0: torch.ones(1, 4, 4, 64)})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"engram_num_embeddings": [10**12, 10**12]}, "engram_num_embeddings says"),
        ({"engram_num_embeddings": [1]}, "one engram_num_embeddings per"),
        ({"engram_compressed_vocab_size": 99092}, "the tokenizer compresses to"),
        ({"engram_vocab_size": 101}, "engram_num_embeddings says"),
        ({"engram_n_heads": 10**9}, "less than or equal to 1024"),
        (
            {"engram_n_heads": 1024, "engram_max_ngram_size": 64},
            "expected at least [0-9]+ engram_num_embeddings by the heads",
        ),
        ({"engram_n_heads": "4"}, "valid integer"),
        ({"engram_pad_token_id": 10**6}, "expected a pad id below"),
        ({"engram_layer_ids": [1, 3]}, "layers.3.engram.embed.weight"),
        ({"engram_layer_ids": [1, 9]}, "distinct engram_layer_ids"),
        ({"engram_head_dim": 64}, "expected shape"),
        ({"hidden_size": 128}, "expected shape"),
        ({"hc_mult": None}, "valid integer"),
    ],
)
def test_a_configuration_that_lies_is_refused(damaged: Callable[..., Path], config: dict, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        open_model(damaged(**config))


SHARD = "model-00002-of-00009.safetensors"


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(directory / SHARD)
    change(tensors)
    save_file(tensors, directory / SHARD)
    return directory


def test_damaged_shards_are_refused(damaged: Callable[..., Path]) -> None:
    prefix = "layers.1.engram."
    directory = damaged()
    (directory / SHARD).unlink()
    with pytest.raises(AdapterError, match=f"{SHARD}: no such file"):
        open_model(directory)
    directory = damaged()
    os.truncate(directory / SHARD, (directory / SHARD).stat().st_size - 10)
    with pytest.raises(AdapterError, match="header describes"):
        open_model(directory)
    with pytest.raises(AdapterError, match="expected dtype F8_E4M3, found F32"):
        open_model(
            rewrite(damaged(), lambda t: t.update({f"{prefix}embed.weight": t[f"{prefix}embed.weight"].float()}))
        )
    with pytest.raises(AdapterError, match="the file does not hold it"):
        open_model(rewrite(damaged(), lambda t: t.pop(f"{prefix}wkv.scale")))
    with pytest.raises(AdapterError, match="expected shape"):
        open_model(
            rewrite(damaged(), lambda t: t.update({f"{prefix}embed.weight": t[f"{prefix}embed.weight"][:-1].clone()}))
        )
    broken = torch.full((4, 64), float("nan"), dtype=torch.bfloat16)
    with pytest.raises(AdapterError, match="not finite"):
        open_model(rewrite(damaged(), lambda t: t.update({f"{prefix}q_weight": broken})))


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x\\y.safetensors", 7]
)
def test_shard_names_that_leave_the_folder_are_refused(damaged: Callable[..., Path], name: object) -> None:
    directory = damaged()
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["layers.1.engram.embed.weight"] = name
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(AdapterError, match="plain .* file name"):
        open_model(directory)


def test_a_changed_row_fails_the_recording(
    damaged: Callable[..., Path], toy: Path, capsys: pytest.CaptureFixture
) -> None:
    """One flipped sign in one addressed row is found, and the worst element is named."""
    model, tokens = open_model(toy), torch.tensor([[5, 9, 14, 30]])
    hidden = torch.randn(1, 4, 4, 64, generator=torch.Generator().manual_seed(3))
    out, cache = model.run_with_cache(tokens, {1: hidden})
    slots = cache["blocks.1.engram.hook_slots"]
    rows = model.engram(1).ngram_hash.rows_of_slots(slots)
    gate = cache["blocks.1.engram.hook_gate"]
    directory = damaged()
    arrays = {
        "input_ids": tokens,
        "L1.hash_ids": rows,
        "L1.hidden_in": hidden,
        "L1.hidden_out": out[1],
        "L1.gate": gate,
    }
    np.savez(directory / "recorded.npz", **{name: value.numpy() for name, value in arrays.items()})
    assert run_check(directory, recorded=directory / "recorded.npz") == 0

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.1.engram.embed.weight"].view(torch.uint8)[int(rows[0, 2, 1])] ^= 0x80

    rewrite(directory, flip)
    capsys.readouterr()
    assert run_check(directory, recorded=directory / "recorded.npz") == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG")]
    assert wrong
    assert all("recorded L1" in line and "at [0, 2," in line for line in wrong)
