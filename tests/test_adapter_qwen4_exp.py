"""Transformers' own Qwen4Exp, random and tiny, through the adapter: nothing changes but what is asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from engram_interp.memory import Engram
from engram_interp.memory.row_reader import TableError
from engram_interp.models.adapters.assemble import RESIDENT_BYTES
from engram_interp.models.adapters.opening import kind_of, open_model
from engram_interp.models.adapters.qwen4_exp import Qwen4ExpModel, open_qwen4_exp
from engram_interp.models.adapters.qwen4_exp_memory import open_qwen4_exp_memory
from engram_interp.models.adapters.tensors import AdapterError
from engram_interp.models.check import check_model
from engram_interp.models.protocol import MemoryModel
from engram_interp.models.site import sites_of
from tests.foreign_checkpoints import EOS, qwen_host


@pytest.fixture(scope="module")
def directory(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as `save_pretrained` writes it: table in shards."""
    path = tmp_path_factory.mktemp("qwen")
    qwen_host(tokenizer.get_vocab_size()).save_pretrained(path)
    (path / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=[RESIDENT_BYTES, 0], ids=["loaded", "mapped"])
def model(directory: Path, request: pytest.FixtureRequest) -> Qwen4ExpModel:
    """With its table in memory, and left in its files: whatever holds for one holds for the other."""
    return open_qwen4_exp(directory, resident_bytes=request.param)


@pytest.fixture(scope="module")
def tokens(tokenizer: Tokenizer) -> torch.Tensor:
    """Two texts; one has an end of text inside, which resets the window."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, tokenizer.get_vocab_size(), (2, 14), generator=generator)
    tokens[1, 6] = EOS
    return tokens


def stored_names(path: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(path / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def test_logits_equal_plain_transformers_bit_for_bit(
    directory: Path, model: Qwen4ExpModel, tokens: torch.Tensor
) -> None:
    from transformers import Qwen4ExpForCausalLM

    plain = Qwen4ExpForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = plain(input_ids=tokens, use_cache=False).logits
    assert torch.equal(model(tokens), expected)
    assert torch.equal(model.run_with_cache(tokens)[0], expected)
    assert isinstance(model, MemoryModel)


@pytest.mark.parametrize("device_map", [None, "cpu"])
def test_a_mapped_table_is_no_part_of_the_host(directory: Path, tokens: torch.Tensor, device_map: str | None) -> None:
    loaded = open_qwen4_exp(directory)
    mapped = open_qwen4_exp(directory, device_map, resident_bytes=0)
    missing = set(loaded.host.state_dict()) - set(mapped.host.state_dict())
    assert missing == {"model.layers.1.ple.ple_embedding.ngram_embedding.weight"}
    assert torch.equal(mapped(tokens), loaded(tokens))
    with pytest.raises(TableError, match=r"expected a table in memory, found .* stays in its file"):
        _ = mapped.engram(1).table.weight


def test_saved_table_is_sharded_and_the_plain_layout_opens_the_same(
    directory: Path, model: Qwen4ExpModel, tokens: torch.Tensor, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    shards = sorted(name for name in stored_names(directory) if "ngram_embedding.shard_" in name)
    assert len(shards) == 4
    state = load_file(directory / "model.safetensors")
    parts = [state.pop(name) for name in sorted(shards, key=lambda name: int(name.split("shard_")[1].split(".")[0]))]
    state[shards[0].split(".shard_")[0] + ".weight"] = torch.cat(parts)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    assert torch.equal(open_qwen4_exp(tmp_path)(tokens), model(tokens))


def test_every_intermediate_is_recorded_with_streams(model: Qwen4ExpModel, tokens: torch.Tensor) -> None:
    _, cache = model.run_with_cache(tokens, "blocks.1.*")
    prefix = "blocks.1.engram.hook_"
    shapes = {name: tuple(cache[prefix + name].shape) for name in
              ("slots", "embedding", "key", "value", "score", "gate", "gated_value", "conv_out")}  # fmt: skip
    b, t = tokens.shape
    assert shapes == {
        "slots": (b, t, 8), "embedding": (b, t, 32), "key": (b, t, 4, 32), "value": (b, t, 32), "score": (b, t, 4),
        "gate": (b, t, 4), "gated_value": (b, t, 4, 32), "conv_out": (b, t, 4, 32),
    }  # fmt: skip
    assert cache["blocks.1.hook_engram_out"].shape == cache["blocks.1.hook_resid_pre"].shape == (b, t, 4, 32)
    assert cache[prefix + "gate"].std() > 0.01


def test_our_engram_computes_what_their_layer_computes(model: Qwen4ExpModel, tokens: torch.Tensor) -> None:
    """Two independent implementations of the layer agree: addresses exactly, the write within float32 rounding."""
    _, cache = model.run_with_cache(tokens, "blocks.1.*")
    engram = model.engram(1)
    assert isinstance(engram, Engram)
    assert torch.equal(engram.ngram_hash.slots(tokens), cache["blocks.1.engram.hook_slots"])
    torch.testing.assert_close(
        engram(cache["blocks.1.hook_resid_pre"], tokens), cache["blocks.1.hook_engram_out"], atol=1e-5, rtol=1e-5
    )


def test_the_exit_path_is_the_models_own(model: Qwen4ExpModel, tokens: torch.Tensor) -> None:
    residuals = model.residuals(tokens)
    assert len(residuals) == 5
    assert torch.equal(model.unembed(model.exit_hidden(residuals[-1])), model(tokens))
    assert torch.equal(residuals[0][:, :, 0], residuals[0][:, :, 3])  # the embedding is copied into every stream


@pytest.mark.parametrize(
    "hook",
    ["hook_engram_out", "engram.hook_embedding", "engram.hook_key", "engram.hook_value", "engram.hook_score",
     "engram.hook_gate", "engram.hook_gated_value", "engram.hook_conv_out", "engram.hook_slots"],
)  # fmt: skip
def test_every_ablation_reaches_the_logits_and_leaves_nothing_behind(
    model: Qwen4ExpModel, tokens: torch.Tensor, hook: str
) -> None:
    before = model(tokens)
    with model.hooks(fwd_hooks=[(f"blocks.1.{hook}", lambda value, hook: torch.zeros_like(value))]):
        changed = model(tokens)
    assert (changed - before).abs().max() > 1e-4
    assert torch.equal(model(tokens), before)


def test_no_output_equals_a_host_without_the_layer(model: Qwen4ExpModel, directory: Path, tokens: torch.Tensor) -> None:
    from transformers import Qwen4ExpForCausalLM

    plain = Qwen4ExpForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    plain.model.layers[1].ple = None
    with model.hooks(fwd_hooks=[("blocks.1.hook_engram_out", lambda value, hook: torch.zeros_like(value))]):
        silenced = model(tokens)
    with torch.no_grad():
        torch.testing.assert_close(silenced, plain(input_ids=tokens, use_cache=False).logits, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 14])
def test_generation_with_and_without_cache_is_equal(model: Qwen4ExpModel, tokens: torch.Tensor, length: int) -> None:
    """The cached n-gram window and convolution inputs give what reading the whole text again gives."""
    start = tokens[:, :length]
    assert torch.equal(model.generate(start, 8), model.generate(start, 8, use_cache=False))


def test_cached_steps_give_the_logits_of_the_whole_text(model: Qwen4ExpModel, tokens: torch.Tensor) -> None:
    whole, past, steps = model(tokens), None, []
    with torch.no_grad():
        for t in range(tokens.shape[1]):
            out = model.host(input_ids=tokens[:, t : t + 1], past_key_values=past, use_cache=True)
            past = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_the_site_is_complete_and_checks(model: Qwen4ExpModel, directory: Path) -> None:
    assert kind_of(directory) == "qwen4_exp"
    (site,) = sites_of(model)
    assert (site.block, site.orders, site.heads, site.streams, site.variant) == (1, (2, 3), 4, 4, "qwen4_exp")
    assert (site.boundary, site.pad, site.eos, site.vocabulary.size) == ("reset", EOS, EOS, model.vocab_size)
    assert site.rows.rows == site.regenerated.rows == site.stored.rows
    assert site.stored.multipliers == site.regenerated.multipliers == site.multipliers
    report = check_model(model)
    assert report.ok, [row for row in report.rows if not row.ok]


@pytest.mark.parametrize("resident_bytes", [2**30, 0])
def test_the_memory_alone_writes_what_the_model_records(
    model: Qwen4ExpModel, directory: Path, tokens: torch.Tensor, resident_bytes: int
) -> None:
    """Raw shards, without transformers, and given the recorded streams: the same addresses, gates and writes."""
    memory = open_qwen4_exp_memory(directory, resident_bytes=resident_bytes)
    _, cache = model.run_with_cache(tokens, "blocks.1.*")
    out, alone = memory.run_with_cache(tokens, {1: cache["blocks.1.hook_resid_pre"]})
    assert torch.equal(alone["blocks.1.engram.hook_slots"], cache["blocks.1.engram.hook_slots"])
    for name in ("engram.hook_gate", "hook_engram_out"):
        torch.testing.assert_close(alone[f"blocks.1.{name}"], cache[f"blocks.1.{name}"], atol=1e-5, rtol=1e-5)
    assert set(out) == {1}
    assert open_model(directory, memory_only=True).engram_layers == (1,)
    report = check_model(memory)
    assert report.ok, [row for row in report.rows if not row.ok]


def test_a_conditional_generation_checkpoint_opens_as_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The published checkpoint nests its text half: `text_config`, `model.language_model.`, other towers beside it."""
    from safetensors.torch import load_file, save_file

    host = qwen_host(tokenizer.get_vocab_size())
    host.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    nested = {"model_type": "qwen4_exp", "architectures": ["Qwen4ExpForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    state = {
        name.replace("model.", "model.language_model.", 1): t
        for name, t in load_file(tmp_path / "model.safetensors").items()
    }
    state["model.visual.patch_embed.proj.bias"] = torch.zeros(4)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    tokens = torch.tensor([[5, 9, 30, 7]])
    with torch.no_grad():
        expected = host(input_ids=tokens, use_cache=False).logits
        assert torch.equal(open_model(tmp_path)(tokens), expected)
        assert torch.equal(open_qwen4_exp(tmp_path, resident_bytes=0)(tokens), expected)
    assert open_model(tmp_path, memory_only=True).engram_layers == (1,)


def test_published_constants() -> None:
    """Multipliers and primes of Qwen3.8-Flash-Next, as its GGUF metadata gives them."""
    from engram_interp.memory import assign_primes, splitmix64_multipliers

    assert splitmix64_multipliers(1234, 0, 248320, 3) == (23703573157769, 20109073645365, 8052911324071)
    primes = [prime for row in assign_primes([20_000_000], 16, 1)[0] for prime in row]
    assert (primes[0], primes[-1], sum(primes)) == (20000003, 20000171, 320001446)


@pytest.mark.parametrize(
    "changes",
    [
        {"ngram_size": 4, "heads_per_ngram": 2, "ple_embed_dim": 36, "hc_count": 2},
        {"ple_layer_ids": [1, 3], "ngram_vocab_size_base": 53, "heads_per_ngram": 2, "ple_conv_kernel_size": 3},
        {"ngram_size": 2, "heads_per_ngram": 1, "hidden_size": 48, "ple_embed_dim": 24},
        {
            "ngram_size": 4,
            "heads_per_ngram": 3,
            "ple_embed_dim": 27,
            "ple_layer_ids": [1, 2, 3],
            "split_ngram_parts": 7,
        },
    ],
)
def test_other_sizes_pass_too(tokenizer: Tokenizer, tokens: torch.Tensor, changes: dict, tmp_path: Path) -> None:
    """Saved by transformers over several files, its table in shards, and opened whole and as memories alone."""
    host = qwen_host(tokenizer.get_vocab_size(), seed=9, **changes)
    with torch.no_grad():
        expected = host(input_ids=tokens, use_cache=False).logits
    host.save_pretrained(tmp_path, max_shard_size="60KB")
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    model = open_model(tmp_path)
    logits, cache = model.run_with_cache(tokens)
    assert torch.equal(logits, expected)
    memory = open_model(tmp_path, memory_only=True)
    assert memory.engram_layers == model.engram_layers == tuple(i - 1 for i in host.config.ple_layer_ids)
    for opened in (model, memory):
        report = check_model(opened)
        assert report.ok, [row for row in report.rows if not row.ok]
    streams = {block: cache[f"blocks.{block}.hook_resid_pre"] for block in model.engram_layers}
    _, alone = memory.run_with_cache(tokens, streams)
    for block in model.engram_layers:
        slots, write = f"blocks.{block}.engram.hook_slots", f"blocks.{block}.hook_engram_out"
        assert torch.equal(alone[slots], cache[slots])
        torch.testing.assert_close(alone[write], cache[write], atol=1e-5, rtol=1e-5)


def copy_with(directory: Path, target: Path, **config: object) -> Path:
    for path in directory.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    values = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(values))
    return target


def test_damaged_checkpoints_give_one_clear_error(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    fresh = lambda **config: copy_with(directory, tmp_path_factory.mktemp("damaged"), **config)  # noqa: E731
    truncated = fresh()
    os.truncate(truncated / "model.safetensors", (truncated / "model.safetensors").stat().st_size - 100)
    with pytest.raises(AdapterError, match="header describes"):
        open_model(truncated)
    with pytest.raises(AdapterError, match="cannot be loaded|mismatched"):
        open_model(fresh(ple_embed_dim=64))
    with pytest.raises(AdapterError, match="multipliers: expected"):
        open_model(fresh(seed=99))
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    tricked = fresh()
    (tricked / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(AdapterError, match="plain .* file name"):
        open_model(tricked)


def test_gates_and_every_ablation_work(model: Qwen4ExpModel) -> None:
    """The probes' own calls: the gates of a text, and each kind of `ablate` changes the logits and gives them back."""
    from engram_interp.hooks import KINDS, ablate, collect_memory_statistics, fit_optimal_constants
    from engram_interp.probes.gates import read_gates

    gates = read_gates(model, "The river Seine flows through Paris.")
    assert gates.gates.shape == (len(gates.tokens), len(model.engram_layers), 4)
    tokens = model.to_tokens("By the way, Alexander the Great was a king of Macedon.")
    before, worked = model(tokens), []
    texts = ["The river Seine flows through Paris.", "Diana, Princess of Wales, was born in Norfolk."]
    statistics = fit_optimal_constants(model, texts, collect_memory_statistics(model, texts), steps=1)
    options = {
        "gate_scale": {"scale": 0.5},
        "keep_order": {"order": 2},
        "heads": {"heads": [0]},
        "slots": {"slots": [1]},
    }
    options |= {"quantise": {"bits": 2}, "prune_rows": {"fraction": 0.5, "by": "use"}}
    for kind in KINDS.values():
        if kind.control and kind.name != "equal_norm_random":
            continue
        branches = [0] if kind.name == "branches" else None
        with ablate(model, kind.name, branches=branches, statistics=statistics, **options.get(kind.name, {})):
            changed = (model(tokens) - before).abs().max()
        assert changed > 1e-6, kind.name
        worked.append(kind.name)
        assert torch.equal(model(tokens), before)
    assert {"output_zero", "embedding_zero", "mean", "optimal", "resample", "equal_norm_random"} <= set(worked)


def test_effects_are_measured_as_on_the_house_model(model: Qwen4ExpModel) -> None:
    from engram_interp.hooks import collect_memory_statistics
    from engram_interp.probes.ablation import Condition, ablation_effects
    from engram_interp.probes.tasks import load_tasks

    tasks = load_tasks(["arithmetic"], model.tokenizer, limit=4)
    statistics = collect_memory_statistics(model, ["The river Seine flows through Paris."])
    conditions = [
        Condition(kind="output_zero"),
        Condition(kind="mean"),
        Condition(kind="gate_scale", options={"scale": 1.0}),
    ]
    rows = ablation_effects(model, tasks, conditions, statistics=statistics).table().set_index("condition")
    assert rows.loc["gate_scale scale=1.0", "change_logprob"] == rows.loc["gate_scale scale=1.0", "kl"] == 0
    assert rows.loc["output_zero", "kl"] > 0 and rows.loc["mean", "kl"] > 0


def test_a_bad_token_is_named(model: Qwen4ExpModel) -> None:
    with pytest.raises(ValueError, match="expected token ids in"):
        model(torch.tensor([[model.vocab_size]]))
    with pytest.raises(KeyError, match="nearest"):
        model.run_with_cache(torch.tensor([[5]]), "blocks.1.engram.hook_gates")
