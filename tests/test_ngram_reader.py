"""Are the fast reader's addresses and vectors those of the hash itself, bit for bit?"""

from __future__ import annotations

import pytest
import torch

from engram_interp.kernels.ngram import NgramReader
from engram_interp.memory import CompressedVocabulary, NgramHash, assign_primes, pcg64_multipliers


def ngram_hash(rows: tuple[int, ...], heads: int, vocab: int, **options) -> NgramHash:
    multipliers = pcg64_multipliers(3, 1, vocab, len(rows) + 1)
    return NgramHash(
        CompressedVocabulary.identity(vocab), multipliers, assign_primes(rows, heads, 1)[0], pad=2, **options
    )


def plain(hash_: NgramHash, table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return table[hash_.rows_of_slots(hash_.slots(tokens))].flatten(-2)


@pytest.mark.parametrize(
    ("rows", "heads"), [((61,), 1), ((16_384, 300), 8), ((2_262_400, 2_262_400), 3), ((101, 5, 7), 2)]
)
@pytest.mark.parametrize("options", [{}, {"boundary": "reset", "eos": 1}, {"window_rule": "engram_peft_1_2"}])
def test_addresses_are_the_integers_of_the_hash(rows, heads, options):
    hash_ = ngram_hash(rows, heads, 129_280, **options)
    reader = NgramReader(hash_, torch.empty(hash_.rows, 1))
    assert reader._address is not None
    tokens = torch.randint(0, 129_280, (3, 1500), generator=torch.Generator().manual_seed(heads))
    assert reader.rows(tokens).equal(hash_.rows_of_slots(hash_.slots(tokens)))


def test_the_largest_head_of_the_float_form_at_the_extremes():
    """Mixes whose rest is 0 or p - 1, where a quotient wrong by one would show, at the largest prime below the limit."""
    hash_ = ngram_hash((2**23 - 200,), 1, 500)
    (prime,) = hash_.sizes
    assert 2**23 - 200 < prime < 2**23
    reader = NgramReader(hash_, torch.empty(prime, 1))
    quotients = torch.randint(0, (2**63 - 1) // prime, (2000,), generator=torch.Generator().manual_seed(0))
    for rest in (0, 1, prime - 1):
        mix = (quotients * prime + rest)[:, None]
        out = torch.empty(2000, 1, dtype=torch.int64)
        reader._put_rows(mix, out)
        assert (out == rest).all()
    out = torch.empty(1, 1, dtype=torch.int64)
    reader._put_rows(torch.tensor([[2**63 - 1]]), out)
    assert out.item() == (2**63 - 1) % prime


def test_larger_heads_take_the_integer_modulus():
    hash_ = ngram_hash((2**23,), 1, 500)
    reader = NgramReader(hash_, torch.empty(hash_.rows, 1))
    assert reader._address is None
    tokens = torch.randint(0, 500, (2, 30), generator=torch.Generator().manual_seed(1))
    assert reader.rows(tokens).equal(hash_.rows_of_slots(hash_.slots(tokens)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_vectors_are_the_rows_and_the_buffer_is_used_again(dtype):
    hash_ = ngram_hash((61, 300), 4, 500)
    table = torch.randn(hash_.rows, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    reader = NgramReader(hash_, table)
    for shape in ((2, 1100), (2, 1100), (1, 1), (3, 7)):
        tokens = torch.randint(0, 500, shape, generator=torch.Generator().manual_seed(shape[1]))
        assert reader.read(tokens).equal(plain(hash_, table, tokens))
    first = reader.read(tokens)
    assert reader.read(tokens).data_ptr() == first.data_ptr()


def test_bad_input():
    hash_ = ngram_hash((61,), 2, 500)
    with pytest.raises(ValueError, match=f"at least {hash_.rows} rows, found 7"):
        NgramReader(hash_, torch.empty(7, 4))
    with pytest.raises(ValueError, match=r"in \[0, 500\), found 500"):
        NgramReader(hash_, torch.empty(hash_.rows, 4)).read(torch.tensor([[3, 500]]))
