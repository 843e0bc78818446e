"""Our module with the weights of transformers' own `Qwen4ExpTextPLELayer` computes what that layer computes."""

from __future__ import annotations

import pytest
import torch

from engram_interp.memory import (
    CompressedVocabulary,
    Engram,
    EngramOptions,
    EngramState,
    NgramHash,
    assign_primes,
    splitmix64_multipliers,
)

VOCAB, EOS = 97, 5


def reference(index: int, ngram_size: int, streams: int) -> torch.nn.Module:
    """The library's layer, the `index`-th of its model, with every parameter random."""
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
    from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextPLELayer

    config = Qwen4ExpTextConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        num_hidden_layers=4,
        hc_count=streams,
        ple_layer_ids=[1, 2, 3],
        ple_embed_dim=24,
        ngram_size=ngram_size,
        heads_per_ngram=2,
        ngram_vocab_size_base=100,
        make_ngram_vocab_size_divisible_by=16,
        eos_token_id=EOS,
        num_experts=2,
        num_experts_per_tok=1,
    )
    layer = Qwen4ExpTextPLELayer(config, layer_idx=index, ple_layer_index=index)
    generator = torch.Generator().manual_seed(index)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return layer.requires_grad_(False)


def ours(layer: torch.nn.Module, index: int, ngram_size: int) -> Engram:
    """Our layer with its weights; the hash is built from constants alone."""
    primes = assign_primes([100] * (ngram_size - 1), 2, index + 1)[index]
    multipliers = splitmix64_multipliers(1234, index, VOCAB, ngram_size)
    ngram_hash = NgramHash(
        CompressedVocabulary.identity(VOCAB), multipliers, primes, pad=EOS, boundary="reset", eos=EOS
    )
    streams = layer.hc_count
    options = EngramOptions(
        width=24, branches=streams, head_width=24 // len(ngram_hash.sizes), gate_eps=1e-6, conv_eps=1e-6, conv_kernel=4
    )
    module = Engram(ngram_hash, options)
    gains = {
        f"{name}_norm": 1 + getattr(layer, f"norm_{name}").weight.view(streams, 24) for name in ("key", "query", "conv")
    }
    module.load_state_dict(
        gains
        | {
            "table.weight": layer.ple_embedding.ngram_embedding.weight[: ngram_hash.rows],  # the rest is padding
            "key_proj.weight": layer.key_proj.weight,
            "value_proj.weight": layer.value_proj.weight,
            "conv": layer.conv1d.weight.view(streams, 24, 4),
        }
    )
    return module.requires_grad_(False)


def rows_read(layer: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The rows of its table that the library's layer looks up."""
    seen: list[torch.Tensor] = []
    handle = layer.ple_embedding.ngram_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        layer.ple_embedding(tokens, None)
    finally:
        handle.remove()
    return seen[0]


@pytest.mark.parametrize(("index", "ngram_size", "streams"), [(0, 3, 4), (1, 3, 2), (2, 4, 3), (0, 2, 2)])
@pytest.mark.parametrize("eos_share", [0.0, 0.25])
def test_outputs_and_addresses_agree(index: int, ngram_size: int, streams: int, eos_share: float) -> None:
    layer = reference(index, ngram_size, streams)
    module = ours(layer, index, ngram_size)
    assert layer.ple_embedding.layer_multipliers.tolist() == list(module.ngram_hash.multipliers)
    assert layer.ple_embedding.ngram_heads_vocab_sizes.tolist() == list(module.ngram_hash.sizes)
    assert layer.ple_embedding.ngram_heads_offsets.tolist() == list(module.ngram_hash.offsets)
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randint(6, VOCAB, (3, 21), generator=generator)
    tokens[torch.rand(3, 21, generator=generator) < eos_share] = EOS
    hidden = torch.randn(3, 21, streams, 24, generator=generator)
    assert torch.equal(module.ngram_hash.rows_of_slots(module.ngram_hash.slots(tokens)), rows_read(layer, tokens))
    expected = layer(hidden.flatten(-2), tokens, None).unflatten(-1, (streams, 24))
    torch.testing.assert_close(module(hidden, tokens), expected, rtol=0, atol=1e-5)
    state = EngramState.start(module, 3)
    parts = (slice(0, 1), slice(1, 9), slice(9, 10), slice(10, 21))
    pieces = [module(hidden[:, part], tokens[:, part], state) for part in parts]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=1e-5)


def test_texts_with_eos_need_the_boundary_rule() -> None:
    """The comparison above can fail: without `reset` the addresses after an eos differ."""
    layer = reference(0, 3, 2)
    right = ours(layer, 0, 3).ngram_hash
    plain = NgramHash(right.vocabulary, right.multipliers, right.primes, pad=EOS)
    tokens = torch.tensor([[8, 9, EOS, 10, 11]])
    assert torch.equal(plain.slots(tokens)[:, :3], right.slots(tokens)[:, :3])
    assert not torch.equal(plain.rows_of_slots(plain.slots(tokens)), rows_read(layer, tokens))
