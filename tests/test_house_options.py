"""What training studies take away or exchange: gate, fusion, compression, experts, the shared head."""

from __future__ import annotations

import pytest
import torch

from engram_interp.models.house import HouseModel, hashed_vocabulary, initialise


@pytest.fixture
def tokens(tiny_engram: HouseModel) -> torch.Tensor:
    return torch.randint(3, tiny_engram.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))


def changed(tokenizer, tiny_engram, **memory):
    """The small model with another memory and its own random weights."""
    config = tiny_engram.cfg.model_copy(update={"engram": tiny_engram.cfg.engram.model_copy(update=memory)})
    model = HouseModel(config, hashed_vocabulary(config, tokenizer), tokenizer)
    return initialise(model, torch.Generator().manual_seed(0), table_std=0.5).requires_grad_(False)


def test_an_open_gate_writes_the_whole_value(tokenizer, tiny_engram, tokens):
    model = changed(tokenizer, tiny_engram, gate="open", conv_kernel=0)
    _, cache = model.run_with_cache(tokens)
    assert (cache["blocks.1.engram.hook_gate"] == 1).all()
    value = cache["blocks.1.engram.hook_value"].unsqueeze(2).expand_as(cache["blocks.1.hook_engram_out"])
    assert torch.equal(cache["blocks.1.hook_engram_out"], value)


def test_a_memory_fused_once_writes_the_same_to_every_stream(tokenizer, tiny_engram, tokens):
    model = changed(tokenizer, tiny_engram, fusion="mean")
    _, cache = model.run_with_cache(tokens)
    assert cache["blocks.1.engram.hook_gate"].shape[-1] == 1
    write = cache["blocks.1.hook_engram_out"]
    assert write.shape[2] == model.cfg.streams
    assert torch.equal(write[:, :, 0], write[:, :, -1])
    read = cache["blocks.1.hook_resid_pre"].mean(2, keepdim=True)
    torch.testing.assert_close(model.engram(1)(read, tokens), write[:, :, :1])


def test_without_compression_raw_ids_are_hashed(tokenizer, tiny_engram):
    size = tiny_engram.cfg.vocab_size
    model = changed(tokenizer, tiny_engram, compressed=False, compressed_vocab_size=size)
    assert model.vocabulary.size == size
    the, capital = (tokenizer.encode(word, add_special_tokens=False).ids[0] for word in (" the", " The"))
    assert the != capital
    pair = torch.tensor([[the], [capital]])
    slots = model.engram(1).ngram_hash.slots(pair)
    assert not torch.equal(slots[0], slots[1])
    assert torch.equal(*tiny_engram.engram(1).ngram_hash.slots(pair).unbind(0))


def test_dense_blocks_and_a_head_of_its_own(tokenizer, tiny_engram, tokens):
    config = tiny_engram.cfg.model_copy(update={"dense_blocks": 2, "dense_width": 24, "tied": False})
    model = HouseModel(config, tiny_engram.vocabulary, tokenizer)
    initialise(model, torch.Generator().manual_seed(0))
    logits, cache = model.run_with_cache(tokens)
    assert "blocks.1.mlp.hook_router_logits" not in cache
    assert "blocks.2.mlp.hook_router_logits" in cache
    assert torch.equal(logits, model.exit_hidden(cache["blocks.3.hook_resid_post"]) @ model.head.weight.T)
    assert torch.equal(model.W_U, model.head.weight.T)
    hidden, balance = model.streams(tokens)
    hidden.sum().backward()
    assert model.blocks[0].mlp.w_in.weight.grad.abs().sum() > 0
    assert float(balance.detach()) > 0


def test_dense_blocks_need_a_width(tiny_engram):
    raw = tiny_engram.cfg.model_dump() | {"dense_blocks": 1}
    with pytest.raises(ValueError, match="dense_width"):
        type(tiny_engram.cfg).model_validate(raw)
