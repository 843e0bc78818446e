"""The comparison with recorded runs of the demo: right recordings pass, one wrong number is found and named.

Recordings of other shapes come from `record` below, a second implementation of the published formulas in plain numpy
and Python integers that shares no code with the package.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from engram_interp.memory import CompressedVocabulary, EngramOptions, NgramHash, assign_primes, pcg64_multipliers
from engram_interp.memory.demo import DemoStateError, demo_shapes, engram_from_demo
from engram_interp.memory.recorded import RecordingError, compare_recorded, run_vectors_check

# -- the published formulas, written a second time -------------------------------------------------------------------


def token_map(tokenizer: Tokenizer) -> np.ndarray:
    first: dict[str, int] = {}
    ids = []
    for token in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([token], skip_special_tokens=False)
        if "\ufffd" in text:
            key = tokenizer.id_to_token(token)
        else:
            folded = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
            folded = "".join(c for c in folded if unicodedata.category(c) != "Mn").lower()
            folded = re.sub(r"[ \t\r\n]+", " ", folded)
            key = (" " if folded == " " else folded.strip()) or text
        ids.append(first.setdefault(key, len(first)))
    return np.array(ids)


def primes_of(sizes: list[int], heads: int, layers: int) -> list[np.ndarray]:
    used: set[int] = set()
    result = []
    for _ in range(layers):
        rows = []
        for size in sizes:
            candidate, row = size - 1, []
            while len(row) < heads:
                candidate += 1
                if (
                    candidate > 1
                    and candidate not in used
                    and all(candidate % d for d in range(2, math.isqrt(candidate) + 1))
                ):
                    used.add(candidate)
                    row.append(candidate)
            rows.append(row)
        result.append(np.array(rows))
    return result


def rms(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def hash_ids(ids: np.ndarray, multipliers: list[int], primes: np.ndarray, pad: int) -> np.ndarray:
    out = np.zeros((*ids.shape, primes.size), dtype=np.int64)
    for b, t in np.ndindex(*ids.shape):
        mix, slots = int(ids[b, t]) * multipliers[0], []
        for back in range(1, len(multipliers)):
            mix ^= (int(ids[b, t - back]) if t >= back else pad) * multipliers[back]
            slots += [mix % int(prime) for prime in primes[back - 1]]
        out[b, t] = slots
    return out


def layer_output(state: dict[str, np.ndarray], slots: np.ndarray, hidden: np.ndarray, dilation: int) -> np.ndarray:
    s = {name: value.astype(np.float64) for name, value in state.items()}
    rows = slots + state["multi_head_embedding.offsets"]
    memory = s["multi_head_embedding.embedding.weight"][rows].reshape(*slots.shape[:2], -1)
    value = memory @ s["value_proj.weight"].T + s["value_proj.bias"]
    batch, length, branches, width = hidden.shape
    kernel = s["short_conv.conv.weight"].shape[-1]
    taps = s["short_conv.conv.weight"].reshape(branches, width, kernel)
    out = np.zeros(hidden.shape)
    for m in range(branches):
        key = memory @ s[f"key_projs.{m}.weight"].T + s[f"key_projs.{m}.bias"]
        eps = np.finfo(np.float32).eps
        normed_key, normed_query = (
            rms(key, eps) * s[f"norm1.{m}.weight"],
            rms(hidden[:, :, m], eps) * s[f"norm2.{m}.weight"],
        )
        score = (normed_key * normed_query).sum(-1) / math.sqrt(width)
        gate = 1 / (1 + np.exp(-np.sign(score) * np.sqrt(np.maximum(np.abs(score), 1e-6))))
        gated = gate[..., None] * value
        normed = rms(gated, 1e-5) * s[f"short_conv.norms.{m}.weight"]
        mixed = np.zeros((batch, length, width))
        for t in range(length):
            for tap in range(kernel):
                source = t - (kernel - 1 - tap) * dilation
                if source >= 0:
                    mixed[:, t] += normed[:, source] * taps[m, :, tap]
        out[:, :, m] = gated + mixed / (1 + np.exp(-mixed))
    return out.astype(np.float32)


def record(
    directory: Path,
    tokenizer: Tokenizer,
    *,
    orders: int = 3,
    heads: int = 2,
    branches: int = 2,
    layers: tuple[int, ...] = (1, 4),
    seed: int = 0,
    pad: int = 2,
    kernel: int = 4,
    sizes: tuple[int, ...] = (97, 53, 211),
    length: int = 17,
) -> tuple[Path, Path]:
    """Write a recording of random weights; the stem and the tokenizer's path."""
    rng = np.random.default_rng(seed + 1)
    width, columns, sizes = 12, 6, sizes[: orders - 1]
    compressed = token_map(tokenizer)
    size = int(compressed.max()) + 1
    tokens = rng.integers(0, len(compressed), (2, length))
    arrays = {"input_ids": tokens, "token_map": compressed}
    for layer, primes in zip(layers, primes_of(list(sizes), heads, len(layers)), strict=True):
        bound = max(1, (np.iinfo(np.int64).max // size) // 2)
        draws = np.random.default_rng(seed + 10007 * layer).integers(0, bound, size=(orders,), dtype=np.int64)
        multipliers = [2 * int(draw) + 1 for draw in draws]
        slots = hash_ids(compressed[tokens], multipliers, primes, int(compressed[pad]))
        flat, mem = primes.reshape(-1), columns // heads * primes.size
        state = {
            "multi_head_embedding.embedding.weight": rng.normal(size=(flat.sum(), columns // heads)),
            "value_proj.weight": rng.normal(size=(width, mem)) / 3,
            "value_proj.bias": rng.normal(size=width),
            "short_conv.conv.weight": rng.normal(size=(branches * width, 1, kernel)) / 3,
        }
        for m in range(branches):
            state |= {
                f"key_projs.{m}.weight": rng.normal(size=(width, mem)),
                f"key_projs.{m}.bias": rng.normal(size=width),
            }
            state |= {
                f"{norm}.{m}.weight": rng.normal(1, 0.3, width) for norm in ("norm1", "norm2", "short_conv.norms")
            }
        state = {name: value.astype(np.float32) for name, value in state.items()}
        state["multi_head_embedding.offsets"] = np.concatenate([[0], np.cumsum(flat)[:-1]])
        hidden = rng.normal(size=(2, length, branches, width)).astype(np.float32)
        output = layer_output(state, slots, hidden.astype(np.float64), orders)
        found = {
            "hash_ids": slots,
            "multipliers": np.array(multipliers),
            "primes": primes,
            "hidden_in": hidden,
            "output": output,
        }
        arrays |= {f"L{layer}.{name}": value for name, value in found.items()}
        arrays |= {f"L{layer}.state.{name}": value for name, value in state.items()}
    config = {
        "engram": {
            "max_ngram_size": orders,
            "n_embed_per_ngram": columns,
            "n_head_per_ngram": heads,
            "layer_ids": list(layers),
            "pad_id": pad,
            "seed": seed,
            "kernel_size": kernel,
            "engram_vocab_size": list(sizes),
        },
        "backbone": {"hidden_size": width, "hc_mult": branches, "vocab_size": len(compressed)},
        "compressed_vocab_size": size,
    }
    np.savez(directory / "run_a.npz", **arrays)
    (directory / "run_a.json").write_text(json.dumps(config))
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory / "run_a", directory / "tokenizer.json"


def change(stem: Path, name: str, index: tuple[int, ...], by: float) -> None:
    """Add to one element of a recording."""
    path = stem.with_name(stem.name + ".npz")
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    arrays[name][index] += np.asarray(by).astype(arrays[name].dtype)
    np.savez(path, **arrays)


def edit(stem: Path, section: str, **values: object) -> None:
    """Change the configuration of a recording."""
    path = stem.with_name(stem.name + ".json")
    config = json.loads(path.read_text())
    config[section] |= values
    path.write_text(json.dumps(config))


# -- right recordings pass -------------------------------------------------------------------------------------------


def test_the_recorded_demo_passes(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shared / "vectors"
    assert run_vectors_check(folder / "demo_a", folder / "tokenizer_8192.json") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "demo_a: 12 of 12 quantities agree"
    assert "WRONG" not in out


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"orders": 2, "branches": 1, "layers": (0,), "seed": 7, "pad": 0},
        {"orders": 3, "heads": 2, "branches": 4, "layers": (5, 1), "seed": 123, "pad": 300, "kernel": 3},
        {"orders": 4, "heads": 2, "branches": 2, "layers": (1, 14, 2), "seed": 99, "kernel": 3, "sizes": (2, 400, 90)},
        {"orders": 4, "heads": 3, "branches": 1, "layers": (29,), "kernel": 1},
        {"orders": 4, "heads": 1, "branches": 4, "layers": (3,), "length": 1},
        {"heads": 6, "kernel": 5, "length": 2, "pad": 511},
    ],
    ids=str,
)
def test_recordings_of_other_shapes_pass(tmp_path: Path, tokenizer: Tokenizer, shape: dict) -> None:
    comparison = compare_recorded(*record(tmp_path, tokenizer, **shape))
    assert comparison.ok, [row.line for row in comparison.rows if not row.ok]
    assert len(comparison.rows) == 2 + 5 * len(shape.get("layers", (1, 4)))
    assert {row.worst for row in comparison.rows if row.quantity != "output"} == {0.0}


@pytest.mark.parametrize("suffix", ["", ".npz", ".json"])
def test_either_file_names_the_recording(tmp_path: Path, tokenizer: Tokenizer, suffix: str) -> None:
    stem, tokens = record(tmp_path, tokenizer)
    assert compare_recorded(stem.with_name(stem.name + suffix), tokens).recording == "run_a"


# -- wrong recordings are found --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "index", "by"),
    [
        ("token_map", (100,), 1),
        ("L1.multipliers", (2,), 2),
        ("L4.multipliers", (0,), 1),  # by one in more than 2^50: lost in a comparison of floats
        ("L4.primes", (1, 3), 2),
        ("L1.state.multi_head_embedding.offsets", (7,), 1),
        ("L4.hash_ids", (1, 13, 7), 1),
        ("L1.hash_ids", (0, 0, 0), -1),
        ("L1.output", (1, 5, 3, 47), 3e-5),
        ("L4.output", (0, 0, 0, 0), np.nan),
    ],
)
def test_one_changed_number_is_named(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, index: tuple[int, ...], by: float
) -> None:
    for suffix in (".npz", ".json"):
        shutil.copyfile(shared / "vectors" / f"demo_a{suffix}", tmp_path / f"demo_a{suffix}")
    change(tmp_path / "demo_a", name, index, by)
    assert run_vectors_check(tmp_path / "demo_a", shared / "vectors" / "tokenizer_8192.json") == 1
    lines = capsys.readouterr().out.splitlines()
    wrong = [line for line in lines if line.startswith("WRONG")]
    layer = f"layer {name[1]}" if name.startswith("L") else "all layers"
    assert len(wrong) == 1
    assert wrong[0].startswith(f"WRONG {layer}, {name.rsplit('.', 1)[-1]}: worst element {list(index)} is ")
    assert lines[-1] == "demo_a: 11 of 12 quantities agree"


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("L4.hidden_in", (1, 6, 1, 3)),
        ("L1.state.value_proj.bias", (3,)),
        ("L4.state.norm1.1.weight", (0,)),
        ("L1.state.norm2.0.weight", (11,)),
        ("L1.state.short_conv.conv.weight", (17, 0, 2)),
        ("L4.state.short_conv.norms.0.weight", (2,)),
        ("L4.state.key_projs.1.bias", (5,)),
    ],
)
def test_a_changed_weight_or_input_shows_in_its_layer_s_output(
    tmp_path: Path, tokenizer: Tokenizer, name: str, index: tuple[int, ...]
) -> None:
    stem, tokens = record(tmp_path, tokenizer)
    change(stem, name, index, 0.5)
    wrong = [(row.layer, row.quantity) for row in compare_recorded(stem, tokens).rows if not row.ok]
    assert wrong == [(int(name[1]), "output")]


@pytest.mark.parametrize(
    ("section", "values", "quantities"),
    [
        ("engram", {"seed": 1}, {"multipliers", "hash_ids", "output"}),
        ("engram", {"pad_id": 5}, {"hash_ids", "output"}),
        ("engram", {"layer_ids": [4, 1]}, {"primes", "offsets", "hash_ids"}),
    ],
)
def test_a_changed_configuration_is_found(
    tmp_path: Path, tokenizer: Tokenizer, section: str, values: dict, quantities: set[str]
) -> None:
    stem, tokens = record(tmp_path, tokenizer, sizes=(97, 97, 97))
    edit(stem, section, **values)
    try:
        found = {row.quantity for row in compare_recorded(stem, tokens).rows if not row.ok}
    except RecordingError as error:  # other primes make a table of another size
        assert "multi_head_embedding.embedding.weight: expected shape" in str(error)  # noqa: PT017
        assert "layer_ids" in values
    else:
        assert found == quantities


# -- recordings that cannot be read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [".npz", ".json", "tokenizer"])
def test_a_missing_file_is_one_line(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    stem, tokens = record(tmp_path, tokenizer)
    path = tokens if missing == "tokenizer" else stem.with_name(stem.name + missing)
    path.unlink()
    assert run_vectors_check(stem, tokens) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("error: ")
    assert str(path) in line


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda stem: stem.with_name("run_a.json").write_text("{"), "not JSON"),
        (lambda stem: stem.with_name("run_a.json").write_text("[]"), "expected a JSON object"),
        (lambda stem: stem.with_name("run_a.npz").write_bytes(b"PK\x03\x04 not a zip"), "not a readable .npz"),
        (lambda stem: np.savez(stem.with_name("run_a.npz"), input_ids=np.array([{}])), "without pickled objects"),
        (lambda stem: edit(stem, "engram", seed="0"), "expected an integer under 'seed', found '0'"),
        (lambda stem: edit(stem, "engram", layer_ids=[]), "expected a list of integers under 'layer_ids'"),
        (lambda stem: edit(stem, "engram", engram_vocab_size=[97]), "expected an engram_vocab_size per order"),
        (lambda stem: edit(stem, "engram", pad_id=10**6), "expected a pad_id in"),
        (lambda stem: edit(stem, "engram", layer_ids=[1, 9]), "expected an array 'L9.multipliers'"),
        (lambda stem: edit(stem, "backbone", hc_mult=3), "layer 1, hidden_in: expected shape"),
        (lambda stem: edit(stem, "engram", kernel_size=3), "short_conv.conv.weight: expected shape"),
    ],
)
def test_damage_is_named(tmp_path: Path, tokenizer: Tokenizer, damage: object, message: str) -> None:
    stem, tokens = record(tmp_path, tokenizer)
    damage(stem)
    with pytest.raises(RecordingError, match=re.escape(message)):
        compare_recorded(stem, tokens)


def test_a_damaged_tokenizer_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    stem, tokens = record(tmp_path, tokenizer)
    tokens.write_text("{}")
    with pytest.raises(RecordingError, match="not a tokenizer"):
        compare_recorded(stem, tokens)


# -- weights of a demo layer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("kernel", [0, 4])
def test_demo_weights_are_taken_strictly(biases: bool, kernel: int) -> None:
    primes = assign_primes([11], 2, 1)[0]
    ngram_hash = NgramHash(CompressedVocabulary.identity(9), pcg64_multipliers(0, 1, 9, 2), primes, pad=2)
    options = EngramOptions(width=4, branches=2, head_width=3, biases=biases, conv_kernel=kernel)
    shapes = demo_shapes(ngram_hash, options)
    state = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for name, shape in shapes.items()}
    state["multi_head_embedding.offsets"] = torch.tensor(ngram_hash.offsets)
    layer = engram_from_demo(state, ngram_hash, options)
    assert torch.equal(layer.key_norm[1], state["norm1.1.weight"])
    assert torch.equal(layer.query_norm[1], state["norm2.1.weight"])
    assert torch.equal(layer.key_proj.weight[4:], state["key_projs.1.weight"])
    for name in shapes:
        with pytest.raises(DemoStateError, match="missing 1 tensors"):
            engram_from_demo({k: v for k, v in state.items() if k != name}, ngram_hash, options)
        with pytest.raises(DemoStateError, match=f"{name}: expected shape"):
            engram_from_demo(state | {name: state[name][:-1]}, ngram_hash, options)
    with pytest.raises(DemoStateError, match="1 unexpected tensors, the first is 'key_projs.2.weight'"):
        engram_from_demo(state | {"key_projs.2.weight": state["key_projs.1.weight"]}, ngram_hash, options)
    with pytest.raises(DemoStateError, match=r"offsets: expected \[0, 11\], found \[0, 13\]"):
        engram_from_demo(state | {"multi_head_embedding.offsets": torch.tensor([0, 13])}, ngram_hash, options)
