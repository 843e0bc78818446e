"""Checkpoints: a round trip is exact, anything else is one clear error, and a failed save leaves the old one whole."""

from __future__ import annotations

import io
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from engram_interp.models.checkpoint import (
    CheckpointError,
    load_model,
    read_tensors,
    save_model,
    save_tensors,
    weights_hash,
    write_atomically,
)
from engram_interp.models.house import HouseModel
from engram_interp.models.registry import BUNDLED, load, load_pair


@pytest.fixture(scope="module")
def saved(tiny_engram: HouseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_model(tiny_engram, tiny_engram.tokenizer, directory, torch.float32)
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def test_round_trip_is_exact(saved: Path, tiny_engram: HouseModel) -> None:
    model = load_model(saved)
    tokens = tiny_engram.to_tokens("The Prince of Wales lives in London.")
    assert torch.equal(model(tokens), tiny_engram(tokens))
    assert model.cfg == tiny_engram.cfg
    assert {k: v.dtype for k, v in model.state_dict().items()} == dict.fromkeys(tiny_engram.state_dict(), torch.float32)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert model.identity.weights_sha256 == weights_hash(saved / "model.safetensors")
    assert (model.identity.name, model.identity.kind) == ("tiny-engram", "house")
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert load(saved).cfg == model.cfg


def test_bf16_is_rounded_once_and_stays(tmp_path: Path, tiny_moe: HouseModel) -> None:
    save_model(tiny_moe, tiny_moe.tokenizer, tmp_path / "one")
    once = load_model(tmp_path / "one")
    for name, tensor in tiny_moe.state_dict().items():
        assert torch.equal(once.state_dict()[name], tensor.bfloat16().float()), name
    save_model(once, once.tokenizer, tmp_path / "two")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def pickle_instead(path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"embed.weight": torch.zeros(2)}, buffer)  # noqa: TID251 - to see it refused
    path.write_bytes(buffer.getvalue())


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"model\.safetensors: no such file"),
    "no config": (lambda d: (d / "config.json").unlink(), r"not a checkpoint, config\.json is missing"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), r"tokenizer\.json: no such file"),
    "truncated": (lambda d: truncate(d / "model.safetensors"), "damaged or truncated"),
    "empty": (lambda d: (d / "model.safetensors").write_bytes(b""), "damaged or truncated"),
    "pickle": (lambda d: pickle_instead(d / "model.safetensors"), "damaged or truncated"),
    "wrong shape": (
        lambda d: edit_weights(d, lambda t: t.update({"embed.weight": t["embed.weight"][:-1].clone()})),
        r"'embed\.weight' should have shape \(\d+, 32\), found \(\d+, 32\)",
    ),
    "transposed": (
        lambda d: edit_weights(d, lambda t: t.update({"blocks.0.mlp.w_out": t["blocks.0.mlp.w_out"].mT.contiguous()})),
        r"'blocks\.0\.mlp\.w_out' should have shape \(6, 16, 32\), found \(6, 32, 16\)",
    ),
    "extra tensor": (
        lambda d: edit_weights(d, lambda t: t.update({"blocks.9.surprise": torch.zeros(2)})),
        r"1 unexpected tensors, the first is 'blocks\.9\.surprise'",
    ),
    "missing tensor": (
        lambda d: edit_weights(d, lambda t: t.pop("blocks.1.engram.conv")),
        r"missing 1 tensors, the first is 'blocks\.1\.engram\.conv'",
    ),
    "nan": (
        lambda d: edit_weights(d, lambda t: t["blocks.1.engram.table.weight"].__setitem__((3, 1), torch.nan)),
        r"'blocks\.1\.engram\.table\.weight' holds values that are not finite",
    ),
    "unknown key": (
        lambda d: edit_config(d, lambda c: c.update(colour="red")),
        "colour: Extra inputs are not permitted",
    ),
    "unknown memory key": (
        lambda d: edit_config(d, lambda c: c["engram"].update(size=3)),
        r"engram\.size: Extra inputs",
    ),
    "missing key": (lambda d: edit_config(d, lambda c: c.pop("width")), "width: Field required"),
    "ill-typed key": (
        lambda d: edit_config(d, lambda c: c.update(layers="4")),
        "layers: Input should be a valid integer",
    ),
    "not json": (lambda d: (d / "config.json").write_text("{"), "Invalid JSON"),
    "other vocabulary": (
        lambda d: edit_config(d, lambda c: c.update(vocab_size=c["vocab_size"] + 1)),
        "the tokenizer has",
    ),
    "other compression": (
        lambda d: edit_config(d, lambda c: c["engram"].update(compressed_vocab_size=7)),
        "compresses to 7 ids, found",
    ),
    "bad tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), r"tokenizer\.json: not a tokenizer"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_clear_error(copy: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(copy)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(copy)
    assert len(str(caught.value).splitlines()) == 1
    assert str(copy) in str(caught.value)


def test_unknown_names_list_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"unknown model 'mini-engrm': expected {', '.join(BUNDLED)}"):
        load("mini-engrm")
    with pytest.raises(CheckpointError, match="unknown model"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="unknown pair 'maxi': expected one of mini"):
        load_pair("maxi")


def test_a_save_beyond_the_disk_leaves_the_old_checkpoint_whole(
    copy: Path, fresh_engram: HouseModel, tokenizer: Tokenizer
) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with torch.no_grad():
        fresh_engram.embed.weight.add_(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (len(before["model.safetensors"]) // 2, hard)
    )  # a real failure of write(2)
    try:
        with pytest.raises(CheckpointError, match="not saved, the previous file is untouched"):
            save_model(fresh_engram, tokenizer, copy, torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    load_model(copy)
    save_model(fresh_engram, tokenizer, copy, torch.float32)
    assert torch.equal(load_model(copy).embed.weight, fresh_engram.embed.weight)


def test_a_writer_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def half(part: Path) -> None:
        part.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, half)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert target.read_text() == "old"
    with pytest.raises(CheckpointError, match="not saved"):
        write_atomically(tmp_path / "no" / "file", lambda part: None)


def test_tensors_keep_their_bits_and_names(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).T, "b": torch.tensor(-0.0), "c": torch.randn(2, 2).bfloat16()}
    save_tensors(tmp_path / "t.safetensors", tensors)
    found = read_tensors(tmp_path / "t.safetensors", tensors)
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)
