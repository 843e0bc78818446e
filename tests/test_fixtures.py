"""Are the fixtures every other test stands on what they claim to be, and are shape annotations really executed?"""

from __future__ import annotations

import warnings

import pytest
import torch
from jaxtyping import TypeCheckError

from engram_interp.models.protocol import Decoder, MemoryModel
from engram_interp.models.streams import StreamConnection


def test_a_wrong_shape_is_caught():
    """The jaxtyping hook is in place: the wrapped function refuses a tensor of the wrong rank."""
    with pytest.raises(TypeCheckError):
        StreamConnection(2, 0).read(torch.zeros(1, 3, 4))


def test_warnings_are_errors():
    with pytest.raises(UserWarning, match="of our own"):
        warnings.warn("one of our own", stacklevel=1)


def test_nothing_in_the_models_is_zero_by_accident(tiny_engram, tiny_moe):
    for model in (tiny_engram, tiny_moe):
        for name, parameter in model.named_parameters():
            assert parameter.unique().numel() > 1, f"{name} is constant"
            assert torch.isfinite(parameter).all(), name


def test_the_models_satisfy_the_protocols(tiny_engram, tiny_moe):
    assert isinstance(tiny_engram, MemoryModel)
    assert isinstance(tiny_moe, Decoder)
    assert tiny_engram.engram_layers == (1, 3)
    assert tiny_moe.engram_layers == ()


def test_the_models_read_every_text(tiny_engram, tiny_moe, texts):
    for model in (tiny_engram, tiny_moe):
        for text in texts:
            tokens = model.to_tokens(text)
            assert 4 < tokens.shape[1] <= model.context
            logits = model(tokens)
            assert torch.isfinite(logits).all()
            assert logits.std() > 0.3, "predictions should differ between tokens"


def test_the_memory_speaks(tiny_engram, texts):
    _, cache = tiny_engram.run_with_cache(tiny_engram.to_tokens(texts[0]))
    for layer in tiny_engram.engram_layers:
        gate = cache[f"blocks.{layer}.engram.hook_gate"]
        assert gate.std() > 0.02
        assert cache[f"blocks.{layer}.hook_engram_out"].norm(dim=-1).min() > 0.1
        assert cache[f"blocks.{layer}.engram.hook_conv_out"].abs().max() > 0.01


def test_the_tokenizer_compresses(tokenizer, tiny_engram):
    assert 500 < tokenizer.get_vocab_size() <= 600
    assert tiny_engram.vocabulary.size < tiny_engram.vocabulary.raw_size
    ids = [tokenizer.token_to_id(token) for token in ("The", "Ġthe")]
    assert len(set(ids)) == 2
    assert len({int(tiny_engram.vocabulary.token_map[i]) for i in ids}) == 1


def test_a_fresh_model_can_be_changed(fresh_engram, tiny_engram):
    with torch.no_grad():
        fresh_engram.embed.weight.zero_()
    assert tiny_engram.embed.weight.abs().max() > 0
    assert fresh_engram.embed.weight.requires_grad
    assert not tiny_engram.embed.weight.requires_grad


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_compiled_model_can_be_tested(fresh_engram, texts):
    tokens = fresh_engram.to_tokens(texts[0])
    with torch.no_grad():
        expected = fresh_engram(tokens)
        torch._dynamo.reset()
        compiled = torch.compile(fresh_engram, backend="eager", dynamic=False)
        torch.testing.assert_close(compiled(tokens), expected)
    torch._dynamo.reset()


def test_shapes_are_checked_again_afterwards():
    with pytest.raises(TypeCheckError):
        StreamConnection(2, 0).read(torch.zeros(1, 3, 4))
