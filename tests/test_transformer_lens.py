"""The house model in Hugging Face form, and the TransformerLens bridge on it."""

from __future__ import annotations

import copy
import json
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from engram_interp.hooks import ablate
from engram_interp.memory import CompressedVocabulary
from engram_interp.models.adapters import transformer_lens_architecture as architecture
from engram_interp.models.adapters.huggingface import (
    EngramHouseConfig,
    EngramHouseForCausalLM,
    export_huggingface,
    register_huggingface,
)
from engram_interp.models.checkpoint import CheckpointError
from engram_interp.models.house import HouseModel, initialise

GROUP = "transformer_lens.architectures"
ENGRAM_POINTS = ("slots", "embedding", "key", "value", "score", "gate", "gated_value", "conv_out")


def one_stream(model: HouseModel) -> HouseModel:
    """The same shape of model with a plain residual stream, random weights, taps included."""
    config = model.cfg.model_copy(update={"streams": 1, "name": f"{model.cfg.name}-m1"})
    built = HouseModel(config, CompressedVocabulary.from_tokenizer(model.tokenizer), model.tokenizer)
    generator = torch.Generator().manual_seed(7)
    initialise(built, generator, table_std=1.0)
    with torch.no_grad():
        built.embed.weight.mul_(10)
        for block in built.engram_layers:
            built.engram(block).conv.normal_(0, 0.5, generator=generator)
    return built.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["engram", "moe", "engram-m1", "moe-m1"])
def house(request, tiny_engram, tiny_moe) -> HouseModel:
    model = tiny_engram if request.param.startswith("engram") else tiny_moe
    return one_stream(model) if request.param.endswith("m1") else model


@pytest.fixture(scope="module")
def exported(house, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("exported") / house.cfg.name
    export_huggingface(house, directory)
    return directory


@pytest.fixture(scope="module")
def bridge(exported) -> TransformerBridge:
    return architecture.open_bridge(exported)


@pytest.fixture
def engram_export(tiny_engram, tmp_path) -> Path:
    export_huggingface(tiny_engram, tmp_path)
    return tmp_path


def padded(model: HouseModel, texts) -> torch.Tensor:
    rows = [model.to_tokens(text)[0] for text in texts[:3]]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.cfg.pad_id)


# -- Hugging Face form -------------------------------------------------------------------------------------------------


def test_exported_model_gives_the_same_logits_bit_for_bit(house, exported, texts):
    register_huggingface()
    tokens = padded(house, texts)
    expected = house(tokens)
    for model in (EngramHouseForCausalLM.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported)):
        assert type(model) is EngramHouseForCausalLM
        assert model(tokens, attention_mask=(tokens != house.cfg.pad_id).long()).logits.equal(expected)
        assert model.model.cfg == house.cfg and not model.training
        assert model.lm_head.weight is model.model.embed.weight
        assert model.model.state_dict().keys() == house.state_dict().keys()
        assert all(model.model.state_dict()[key].equal(value) for key, value in house.state_dict().items())


def test_wrapping_and_exporting_leave_the_model_as_it_was(fresh_engram, tiny_engram, texts):
    tokens = tiny_engram.to_tokens(texts[0])
    wrapped = EngramHouseForCausalLM(EngramHouseConfig.of(fresh_engram.cfg), fresh_engram)
    assert wrapped.model is fresh_engram and wrapped.lm_head.weight is fresh_engram.embed.weight
    assert wrapped(tokens).logits.equal(tiny_engram(tokens))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"width": "wide"}, "width"),
        ({"streams": 3}, "shape"),
        ({"layers": 5}, "missing"),
        ({"layers": 0}, "layers"),
        ({"engram": {"blocks": [1]}}, "engram.rows_per_head"),
    ],
)
def test_config_that_does_not_fit_is_refused(engram_export, change, message):
    path = engram_export / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        EngramHouseForCausalLM.from_pretrained(engram_export)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_or_truncated_file_is_refused(engram_export, name):
    path = engram_export / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError):
        EngramHouseForCausalLM.from_pretrained(engram_export)
    path.unlink()
    with pytest.raises(CheckpointError, match=name):
        EngramHouseForCausalLM.from_pretrained(engram_export)


def test_what_would_change_the_result_is_refused(engram_export, tiny_engram, texts):
    for options in ({"dtype": torch.bfloat16}, {"torch_dtype": "float16"}, {"device_map": "auto"}):
        with pytest.raises(ValueError, match=r"float32|device_map"):
            EngramHouseForCausalLM.from_pretrained(engram_export, **options)
    model, tokens = EngramHouseForCausalLM.from_pretrained(engram_export), tiny_engram.to_tokens(texts[0])
    mask = torch.ones_like(tokens)
    mask[0, 2] = 0
    with pytest.raises(ValueError, match="n-grams ignore masks"):
        model(tokens, attention_mask=mask)
    bare = copy.copy(tiny_engram)
    bare.tokenizer = None
    with pytest.raises(ValueError, match="tokenizer"):
        export_huggingface(bare, engram_export)


# -- bridge ------------------------------------------------------------------------------------------------------------


def test_entry_point_names_the_adapter():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    adapter = architecture.EngramHouseArchitectureAdapter
    assert project["entry-points"][GROUP] == {architecture.ARCHITECTURE: f"{adapter.__module__}:{adapter.__qualname__}"}
    installed = [point for point in entry_points(group=GROUP) if point.name == architecture.ARCHITECTURE]
    if installed:
        assert all(point.load() is adapter for point in installed)
        ArchitectureAdapterFactory.discover_entry_points()
    else:  # a checkout that is not installed, or was before the entry point existed
        ArchitectureAdapterFactory.register_adapter(architecture.ARCHITECTURE, adapter)
    assert ArchitectureAdapterFactory._adapters[architecture.ARCHITECTURE] is adapter


def test_what_the_entry_point_alone_can_do(engram_export, tiny_engram, texts, monkeypatch):
    """Bridging a loaded model needs nothing but the installed entry point. Booting from a directory needs
    `register_architecture()`: transformers knows no plugins, and TransformerLens looks into its own list first.
    """
    from transformer_lens.model_bridge.sources import _hf_format
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    if not any(point.name == architecture.ARCHITECTURE for point in entry_points(group=GROUP)):
        pytest.skip("a checkout that is not installed has no entry point")
    untouched = {k: v for k, v in architecture.SUPPORTED_ARCHITECTURES.items() if k != architecture.ARCHITECTURE}
    monkeypatch.setattr(ArchitectureAdapterFactory, "_adapters", dict(untouched))
    monkeypatch.setattr(ArchitectureAdapterFactory, "_entry_points_discovered", False)
    monkeypatch.setattr(_hf_format.architecture_adapter_factory, "SUPPORTED_ARCHITECTURES", untouched)
    model = EngramHouseForCausalLM.from_pretrained(engram_export)
    with pytest.raises(ValueError, match="Could not determine supported architecture"):
        TransformerBridge.boot_transformers(str(engram_export), hf_model=model, device="cpu")
    bridge = build_bridge_from_module(model, architecture.ARCHITECTURE, hf_config=model.config)
    tokens = tiny_engram.to_tokens(texts[0])
    assert bridge(tokens).equal(tiny_engram(tokens))


def test_bridge_gives_the_same_logits_and_tokens(house, bridge, texts):
    tokens = padded(house, texts)
    assert bridge(tokens).equal(house(tokens))
    for text in texts:
        assert bridge.to_tokens(text).equal(house.to_tokens(text))
    assert bridge.W_U.equal(house.W_U)
    assert (bridge.cfg.n_layers, bridge.cfg.d_model, bridge.cfg.n_ctx) == (house.layers, house.width, house.context)


def test_bridge_boots_from_the_directory(house, exported, texts):
    architecture.register_architecture()
    booted = TransformerBridge.boot_transformers(str(exported), device="cpu")
    tokens = house.to_tokens(texts[0])
    assert booted(tokens).equal(house(tokens))
    assert booted(texts[0]).equal(house(tokens))


def test_bridge_generates_what_the_model_generates(house, bridge, texts):
    tokens = house.to_tokens(texts[0])
    options = {"do_sample": False, "verbose": False, "stop_at_eos": False, "return_type": "tokens"}
    assert bridge.generate(tokens, max_new_tokens=4, **options).equal(house.generate(tokens, 4))


def test_bridge_records_what_the_model_records(house, bridge, texts):
    tokens = padded(house, texts)
    _, expected = house.run_with_cache(tokens)
    _, found = bridge.run_with_cache(tokens)
    names = [f"blocks.{b}.engram.hook_{point}" for b in house.engram_layers for point in ENGRAM_POINTS]
    names += [f"blocks.{b}.hook_engram_out" for b in house.engram_layers]
    names += [f"blocks.{b}.attn.hook_{point}" for b in range(house.layers) for point in "qkvz"]
    names += [name for name in expected if ".mlp." in name or ".ln" in name or name.startswith("ln_final")]
    for name in [*names, "hook_embed"]:
        assert found[name].equal(expected[name]), name
    plain = house.cfg.streams == 1
    seen = {"pre": "hook_resid_pre", "mid": "hook_resid_mid", "post": "hook_resid_post"} if plain else {
        "pre": "hook_in", "mid": "hook_streams_mid", "post": "hook_out"
    }  # fmt: skip
    for block in range(house.layers):
        for place, name in seen.items():
            value = expected[f"blocks.{block}.hook_resid_{place}"]
            assert found[f"blocks.{block}.{name}"].equal(value.squeeze(2) if plain else value)
            assert (f"blocks.{block}.hook_resid_{place}" in bridge.hook_dict) == plain
        assert found[f"blocks.{block}.attn.hook_out"].equal(expected[f"blocks.{block}.hook_attn_out"])
        assert found[f"blocks.{block}.mlp.hook_out"].equal(expected[f"blocks.{block}.hook_mlp_out"])


def test_interventions_through_the_bridge_are_those_on_the_model(house, bridge, texts):
    tokens = house.to_tokens(texts[0])

    def zero(value, hook):
        return torch.zeros_like(value)

    for mid in ("resid", "streams"):
        name = f"blocks.2.hook_{mid}_mid"
        if name in bridge.hook_dict:
            with house.hooks(fwd_hooks=[("blocks.2.hook_resid_mid", zero)]):
                expected = house(tokens)
            assert bridge.run_with_hooks(tokens, fwd_hooks=[(name, zero)]).equal(expected)
            assert not expected.equal(house(tokens))
    if not house.engram_layers:
        return
    with ablate(house, "output_zero"):
        expected = house(tokens)
    names = [f"blocks.{block}.hook_engram_out" for block in house.engram_layers]
    ablated = bridge.run_with_hooks(tokens, fwd_hooks=[(name, zero) for name in names])
    assert ablated.equal(expected)
    assert (ablated - house(tokens)).abs().max() > 1e-3
    assert bridge(tokens).equal(house(tokens))  # and back


def test_gradients_reach_the_gate_through_the_bridge(house, bridge, texts):
    if not house.engram_layers:
        pytest.skip("no memory, no gate")
    gradients = {}

    def keep(gradient, hook):
        gradients[hook.name] = gradient

    name = f"blocks.{house.engram_layers[0]}.engram.hook_gate"
    with bridge.hooks(bwd_hooks=[(name, keep)]):
        bridge(house.to_tokens(texts[0]))[0, -1, 5].backward()
    bridge.zero_grad()
    assert gradients[name].shape[-1] == house.cfg.streams and gradients[name].abs().max() > 0


def test_single_stream_analyses_hold_or_refuse(house, bridge, texts):
    from transformer_lens.tools.analysis import direct_logit_attribution, logit_lens

    tokens = house.to_tokens(texts[0])
    logits, cache = bridge.run_with_cache(tokens)
    plain, memory = house.cfg.streams == 1, bool(house.engram_layers)
    if plain:
        assert logit_lens(bridge, tokens, positions=None).values[-1].allclose(logits, atol=1e-4)
        expected = house.run_with_cache(tokens)[1].accumulated_resid()
        assert cache.accumulated_resid().equal(expected)
    else:
        with pytest.raises(ValueError, match="single-stream"):
            logit_lens(bridge, tokens)
        with pytest.raises(KeyError):
            cache.accumulated_resid()
    if plain and not memory:
        assert cache.decompose_resid().sum(0).allclose(cache["resid_post", -1], atol=1e-5)
    else:
        with pytest.raises(KeyError):
            cache.decompose_resid()
        with pytest.raises((KeyError, ValueError)):
            direct_logit_attribution(bridge, tokens, answer_tokens=int(tokens[0, 1]))
    with pytest.raises(RuntimeError, match="compatibility mode"):
        bridge.enable_compatibility_mode()
