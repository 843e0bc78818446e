"""The published demo's modules, from a recording and from a folder under any prefix; and how kinds are told apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from engram_interp.memory import CompressedVocabulary, assign_primes
from engram_interp.models.adapters.opening import kind_of, open_decoder, open_model
from engram_interp.models.adapters.tensors import AdapterError
from engram_interp.models.check import check_model, run_check
from engram_interp.models.checkpoint import CheckpointError, save_model
from engram_interp.models.house import HouseModel
from engram_interp.models.site import sites_of

ENGRAM = {
    "max_ngram_size": 3, "n_embed_per_ngram": 12, "n_head_per_ngram": 3, "layer_ids": [1, 4], "pad_id": 2, "seed": 5,
    "kernel_size": 4, "engram_vocab_size": [61, 90], "tokenizer_name_or_path": "x",
}  # fmt: skip
BACKBONE = {"hidden_size": 16, "hc_mult": 2, "vocab_size": 600, "num_layers": 6}
PREFIXES = ("layers.{}.engram.", "L{}.", "model.transformer.h.{}.")


def write_demo(directory: Path, tokenizer: Tokenizer, prefix: str, *, biases: bool = True) -> Path:
    """A folder with the state of the demo's modules, under a prefix of somebody's choice."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    draw = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
    for layer, primes in zip(ENGRAM["layer_ids"], assign_primes(ENGRAM["engram_vocab_size"], 3, 2), strict=True):
        sizes = [prime for order in primes for prime in order]
        state = {
            "multi_head_embedding.offsets": torch.tensor(np.cumsum([0, *sizes[:-1]])),
            "multi_head_embedding.embedding.weight": draw(sum(sizes), 4),
            "short_conv.conv.weight": draw(32, 1, 4),
        }
        for name in ("value_proj", "key_projs.0", "key_projs.1"):
            state[f"{name}.weight"] = draw(16, 24)
            if biases:
                state[f"{name}.bias"] = draw(16)
        for norm in ("norm1", "norm2", "short_conv.norms"):
            state |= {f"{norm}.{i}.weight": 1 + draw(16) / 4 for i in range(2)}
        tensors |= {prefix.format(layer) + name: tensor for name, tensor in state.items()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"engram": ENGRAM, "backbone": BACKBONE}))
    (directory / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    return directory


def test_the_recorded_run_is_reproduced(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shared / "vectors" / "demo_a.npz"
    assert run_check(path, recorded=path) == 0
    out = capsys.readouterr().out
    assert all(f"recorded L{layer}.{name}" in out for layer in (1, 4) for name in ("output", "hash_ids", "multipliers"))
    assert "WRONG" not in out


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("biases", [True, False])
def test_a_folder_opens_under_any_prefix(tokenizer: Tokenizer, tmp_path: Path, prefix: str, biases: bool) -> None:
    model = open_model(write_demo(tmp_path, tokenizer, prefix, biases=biases))
    assert model.engram_layers == (1, 4)
    assert [site.value.bias is not None for site in sites_of(model)] == [biases] * 2
    assert model.to_tokens("the sea").shape[1] > 1
    report = check_model(model)
    assert report.ok, [row for row in report.rows if not row.ok]


def test_a_damaged_folder_is_one_clear_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_demo(tmp_path, tokenizer, PREFIXES[0])
    good = load_file(tmp_path / "model.safetensors")
    weight = "layers.4.engram.key_projs.1.weight"
    for tensors, message in (
        ({name: t for name, t in good.items() if name != weight}, "missing 1 tensors"),
        (good | {weight: good[weight][:-1].clone()}, r"expected shape \(16, 24\)"),
        ({name: t for name, t in good.items() if "layers.4." not in name}, "expected weights of layers"),
        (good | {"other.4.multi_head_embedding.embedding.weight": torch.zeros(2, 2)}, "stored twice"),
    ):
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(AdapterError, match=message):
            open_model(tmp_path)
    save_file(good, tmp_path / "model.safetensors")
    config = {"engram": ENGRAM | {"engram_vocab_size": [61]}, "backbone": BACKBONE}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="expected 2 engram_vocab_size"):
        open_model(tmp_path)


def test_a_house_checkpoint_is_recognised(tiny_engram: HouseModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model(tiny_engram, tokenizer, tmp_path, torch.float32)
    assert kind_of(tmp_path) == "house"
    model = open_model(tmp_path)
    tokens = torch.tensor([[5, 9, 30]])
    assert torch.equal(model(tokens), tiny_engram(tokens))
    with pytest.raises(AdapterError, match="needs no base model"):
        open_model(tmp_path, base=tmp_path)


def test_a_decoder_needs_its_backbone(tiny_engram: HouseModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole, memories = tmp_path / "whole", tmp_path / "memories"
    whole.mkdir()
    memories.mkdir()
    save_model(tiny_engram, tokenizer, whole, torch.float32)
    tokens = torch.tensor([[5, 9, 30]])
    assert torch.equal(open_decoder(whole)(tokens), tiny_engram(tokens))
    write_demo(memories, tokenizer, PREFIXES[0])
    with pytest.raises(AdapterError, match=r"with its backbone.*found only the memories of .* in blocks \[1, 4\]"):
        open_decoder(memories)
    with pytest.raises(AdapterError, match="needs no base model"):
        open_decoder(whole, base=whole)


def test_an_unknown_directory_lists_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a model directory with config.json"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match=r"'bert'.*house checkpoint.*deepseek_v41.*qwen4_exp.*engram-peft.*demo"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        open_model(tmp_path)


def test_a_token_map_of_the_recording_is_that_of_its_tokenizer(shared: Path) -> None:
    tokenizer = Tokenizer.from_file(str(shared / "vectors" / "tokenizer_8192.json"))
    model = open_model(shared / "vectors" / "demo_a.npz")
    assert np.array_equal(model.sites[0].vocabulary.token_map, CompressedVocabulary.from_tokenizer(tokenizer).token_map)
