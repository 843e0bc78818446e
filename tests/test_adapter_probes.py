"""Every probe and every ablation on other people's models, through the same calls as on the house model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from engram_interp.hooks import KINDS, AblationError, ablate, collect_memory_statistics, fit_optimal_constants
from engram_interp.models.adapters.hosted import HostedModel
from engram_interp.models.adapters.opening import open_decoder, open_decoders, open_model
from engram_interp.probes.collisions import slot_collisions
from engram_interp.probes.gate_statistics import record_gates
from engram_interp.probes.gates import read_gates
from engram_interp.probes.lens import logit_lens_kl
from engram_interp.probes.lens_comparison import compare_lens
from engram_interp.probes.memory_table import lookup, neighbours, read_slot
from engram_interp.probes.patching import patch_memory
from engram_interp.probes.similarity import cka_heatmap
from tests.ablation_options import OPTIONS
from tests.foreign_checkpoints import PEFT_SHAPES, qwen_host, write_adapter, write_base


@pytest.fixture(scope="module")
def directories(tokenizer, tmp_path_factory) -> dict[str, tuple[Path, Path | None]]:
    """By kind, the directory of a model and its base."""
    qwen, adapter, base = (tmp_path_factory.mktemp(name) for name in ("qwen", "adapter", "base"))
    qwen_host(tokenizer.get_vocab_size()).save_pretrained(qwen)
    (qwen / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    write_adapter(adapter, PEFT_SHAPES["as recorded"], tokenizer, container=None)
    return {"qwen4_exp": (qwen, None), "engram_peft": (adapter, write_base(base, tokenizer, "Qwen2Moe"))}


@pytest.fixture(scope="module", params=["qwen4_exp", "engram_peft"])
def model(request, directories) -> HostedModel:
    directory, base = directories[request.param]
    return open_model(directory, base=base)


@pytest.fixture(scope="module")
def statistics(model, texts):
    fitted = collect_memory_statistics(model, texts[4:8], donors=64)
    return fit_optimal_constants(model, texts[4:6], fitted, steps=2)


@pytest.fixture(scope="module")
def tokens(model, texts) -> torch.Tensor:
    return model.to_tokens(texts[0])


def arguments_of(kind: str, model: HostedModel, statistics) -> dict[str, object]:
    arguments = OPTIONS.get(kind, {}) | {"statistics": statistics}
    if kind == "branches":
        arguments["branches"] = [model.layout.streams - 1]  # the write of an adapter is one sum
    if kind == "attn_zero" and "blocks.1.hook_resid_mid" not in model.hook_dict:
        return arguments | {"match": False}  # the size of its write cannot be measured there
    return arguments


@pytest.mark.parametrize("kind", KINDS)
def test_every_ablation_changes_the_logits_and_gives_them_back(kind, model, statistics, tokens):
    before = model(tokens)
    with ablate(model, kind, **arguments_of(kind, model, statistics)):
        changed = model(tokens)
    assert (changed - before).abs().max() > 1e-5  # the experts of transformers' class start at 0.02
    assert torch.equal(model(tokens), before)


def test_a_control_that_cannot_be_matched_says_so(model, statistics):
    if "blocks.1.hook_resid_mid" in model.hook_dict:
        pytest.skip("this model shows its streams between attention and experts, so the size is measured")
    with pytest.raises(AblationError, match="use match=False"), ablate(model, "attn_zero", statistics=statistics):
        pass


def test_hook_points_of_a_layer_hold_what_it_computes(model, tokens):
    logits, cache = model.run_with_cache(tokens)
    assert torch.equal(logits, model(tokens))
    for block in range(model.layers):
        assert cache[f"blocks.{block}.hook_attn_out"].shape == (*tokens.shape, model.width)
        weights = cache[f"blocks.{block}.mlp.hook_expert_weights"]
        assert weights.shape == (*tokens.shape, 2)
        assert bool((weights[..., 0] >= weights[..., 1]).all())
        streams = cache[f"blocks.{block}.hook_resid_post"]
        if model.layout.streams == 1:
            written = cache[f"blocks.{block}.hook_attn_out"] + cache[f"blocks.{block}.hook_mlp_out"]
            if block in model.engram_layers:
                written = written + cache[f"blocks.{block}.hook_engram_out"].squeeze(2)
            before = cache[f"blocks.{block}.hook_resid_pre"].squeeze(2)
            torch.testing.assert_close(before + written, streams.squeeze(2))
            continue
        mid, out = cache[f"blocks.{block}.hook_resid_mid"], cache[f"blocks.{block}.hook_mlp_out"]
        layer = model.layout.layers[block]
        _, carried, injection = layer.mlp_hyper_connection(mid.flatten(-2))
        expected = carried.unflatten(-1, (-1, model.width)) + out.unsqueeze(-2) * injection.unsqueeze(-1)
        torch.testing.assert_close(expected, streams)


@pytest.mark.parametrize(
    "kind", ["output_zero", "hash_permute", "keep_order", "gate_closed", "heads", "conv_off", "one_row"]
)
def test_ablated_generation_is_the_same_with_cached_states(kind, directories, statistics, model, tokens):
    """The n-gram window and the convolution inputs that transformers caches are those of the ablated memory."""
    if model.identity.kind != "qwen4_exp":
        pytest.skip("an adapter on a base model reads the whole text at every step")
    start = tokens[:, :5]
    with ablate(model, kind, **arguments_of(kind, model, statistics)):
        cached, whole = model.generate(start, 6), model.generate(start, 6, use_cache=False)
        past, steps = None, []
        for t in range(tokens.shape[1]):
            out = model.host(input_ids=tokens[:, t : t + 1], past_key_values=past, use_cache=True)
            past, steps = out.past_key_values, [*steps, out.logits]
        torch.testing.assert_close(torch.cat(steps, dim=1), model(tokens), atol=1e-4, rtol=1e-4)
    assert torch.equal(cached, whole)


def test_gates_lens_similarity_and_patching(model, tokenizer, texts, tokens, tmp_path):
    gates = read_gates(model, texts[0])
    branches = model.engram(model.engram_layers[0]).options.branches
    assert gates.gates.shape == (tokens.shape[1], len(model.engram_layers), branches)
    recorded = model.run_with_cache(tokens, f"blocks.{model.engram_layers[0]}.engram.hook_gate")[1]
    assert np.array_equal(gates.gates[:, 0], next(iter(recorded.values()))[0].numpy())
    assert {row.layer for row in record_gates(model, texts[:4]).summaries} == set(model.engram_layers)
    baseline = open_decoder(write_base(tmp_path, tokenizer, layers=model.layers))  # any Hugging Face model is one
    comparison = compare_lens(*(logit_lens_kl(m, list(texts[:6])) for m in (model, baseline)))
    assert comparison.overall.documents == 6
    heatmap = cka_heatmap(model, baseline, list(texts), "all", k=2, permutations=2)
    assert heatmap.matrix.values.shape == (baseline.layers + 1, model.layers + 1)
    answers = (" London", " Paris")
    effects = patch_memory(model, "The Prince of Wales lives in", "The Prince of London lives in", answers)
    assert effects.rows["effect"].abs().max() > 0


def test_the_table_is_read_through_the_same_calls(model, texts, tokens):
    looked_up = lookup(model, texts[0])
    site = model.sites[0]
    slots = model.run_with_cache(tokens, f"blocks.{site.block}.engram.hook_slots")[1]
    rows = (next(iter(slots.values())) + torch.tensor(site.offsets))[0]
    found = [n for n in looked_up.ngrams if n.block == site.block]
    assert [a.row for n in found for a in n.addresses] == rows.flatten().tolist()
    assert len(slot_collisions(model, list(texts)).as_dict()) > 1
    assert len(read_slot(model, int(rows[3, 0])).promoted) == 10
    assert len(neighbours(site, int(rows[3, 0])).rows) == 10


def test_commands_take_an_adapter_with_its_base(directories, tmp_path, capsys):
    from engram_interp.studies.commands import run_ablate

    config = tmp_path / "c.yaml"
    settings = {"tasks": ["gallery_phrase"], "items": 4, "fit_texts": 4}
    config.write_text(yaml.safe_dump({**settings, "kinds": ["output_zero", "mean", "expert_zero"]}))
    for directory, base in directories.values():
        assert run_ablate(str(directory), config, base=base, as_json=True) == 0
        report = json.loads(capsys.readouterr().out)
        assert len(json.dumps(report)) > 200


def test_a_base_goes_to_the_models_that_need_one(directories):
    adapter, base = directories["engram_peft"]
    first, second = open_decoders(adapter, base, base=base)
    assert (first.identity.kind, second.identity.kind) == ("engram_peft", "huggingface")
    tokens = torch.tensor([[5, 9, 30]])
    zero = lambda value, hook: torch.zeros_like(value)  # noqa: E731
    with first.hooks(fwd_hooks=[(f"blocks.{b}.hook_engram_out", zero) for b in first.engram_layers]):
        assert torch.equal(first(tokens), second(tokens))
    with pytest.raises(ValueError, match="expected an engram-peft adapter for the base model"):
        open_decoders(base, base, base=base)
    with pytest.raises(ValueError, match="needs the directory or GGUF file of the base model"):
        open_decoders(adapter, base)
