"""What a token may depend on: earlier tokens only, not padding, not its batch, not how a text is cut for decoding."""

from __future__ import annotations

import copy

import pytest
import torch

from engram_interp.models.house import HouseModel

PAD = 2


def random_tokens(batch: int, length: int, seed: int = 1, vocab: int = 60) -> torch.Tensor:
    return torch.randint(PAD + 1, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_changing_a_token_changes_no_earlier_output_bit(tiny_engram: HouseModel, dtype: torch.dtype) -> None:
    model = copy.deepcopy(tiny_engram).to(dtype)
    tokens = random_tokens(2, 40, vocab=model.vocab_size)
    logits = model(tokens)
    for t in range(1, 40, 3):
        other = tokens.clone()
        other[:, t:] = random_tokens(2, 40 - t, seed=100 + t, vocab=model.vocab_size)
        changed = model(other)
        assert torch.equal(changed[:, :t], logits[:, :t]), t
        assert not torch.equal(changed[:, t], logits[:, t])
        other[:, t:] = PAD
        assert torch.equal(model(other)[:, :t], logits[:, :t]), t


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.float64, 1e-12)])
def test_padding_and_batching_do_not_change_a_text(
    tiny_engram: HouseModel, dtype: torch.dtype, tolerance: float
) -> None:
    model = copy.deepcopy(tiny_engram).to(dtype)
    long, short = random_tokens(1, 30, vocab=model.vocab_size), random_tokens(1, 12, seed=5, vocab=model.vocab_size)
    padded = torch.nn.functional.pad(short, (0, 18), value=PAD)
    both = model(torch.cat([long, padded]))
    torch.testing.assert_close(both[:1], model(long), rtol=0, atol=tolerance)
    torch.testing.assert_close(both[1:, :12], model(short), rtol=0, atol=tolerance)


@pytest.mark.parametrize("row", [[PAD, 5, 6], [5, PAD, 6], [PAD, PAD, PAD], [5, 6, PAD, 7]])
def test_padding_before_a_token_is_refused(tiny_engram: HouseModel, row: list[int]) -> None:
    with pytest.raises(ValueError, match="pad on the right"):
        tiny_engram(torch.tensor([row]))
    with pytest.raises(ValueError, match="no padding"):
        tiny_engram(torch.tensor([row]), tiny_engram.start_decoding(1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-5)])
@pytest.mark.parametrize("sizes", [[1] * 40, [7, 1, 1, 20, 2, 9], [39, 1], [1, 39]])
def test_decoding_in_pieces_equals_one_forward(
    tiny_engram: HouseModel, sizes: list[int], dtype: torch.dtype, tolerance: float
) -> None:
    model = copy.deepcopy(tiny_engram).to(dtype)
    tokens = random_tokens(2, 40, vocab=model.vocab_size)
    whole, state = model(tokens), model.start_decoding(2)
    pieces = [model(part, state) for part in tokens.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=tolerance)
    assert state.seen == 40


def test_generation_is_the_argmax_of_full_forwards(tiny_engram: HouseModel) -> None:
    model = copy.deepcopy(tiny_engram).double()
    start = random_tokens(2, 4, vocab=model.vocab_size)
    slow = start
    for _ in range(12):
        last = model(slow)[:, -1]
        last[:, PAD] = -torch.inf
        slow = torch.cat([slow, last.argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(start, 12), slow)
