"""The n-gram hash: constants of two released models, exact integers, and what an address depends on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_interp.memory import (
    CompressedVocabulary,
    NgramHash,
    assign_primes,
    pcg64_multipliers,
    splitmix64_multipliers,
)

BIG = 4_000_037  # heads this large make an accidental collision in a test all but impossible


def build(orders: int = 3, heads: int = 2, vocab: int = 50, rows: int = BIG, **options: object) -> NgramHash:
    """A hash over uncompressed ids, pad 2."""
    primes = assign_primes([rows] * (orders - 1), heads, 1)[0]
    multipliers = pcg64_multipliers(0, 1, vocab, orders)
    return NgramHash(CompressedVocabulary.identity(vocab), multipliers, primes, **{"pad": 2} | options)


def reference_slots(ngram_hash: NgramHash, tokens: list[int], before: list[int] | None = None) -> list[list[int]]:
    """The published formula in Python's unbounded integers, one address at a time."""
    longest = len(ngram_hash.multipliers)
    ids = [int(ngram_hash.vocabulary.token_map[token]) for token in tokens]
    history = ([ngram_hash.pad] * (longest - 1) if before is None else before) + ids
    slots = []
    for t in range(len(ids)):
        row = []
        for order in range(2, longest + 1):
            mix = 0
            for back in range(order):
                product = history[t + longest - 1 - back] * ngram_hash.multipliers[back]
                assert product < 2**63
                mix ^= product
            row += [mix % prime for prime in ngram_hash.primes[order - 2]]
        slots.append(row)
    return slots


# -- constants of released models -----------------------------------------------------------------------------------


def test_deepseek_v41_flash_constants() -> None:
    first, second = assign_primes([16_000_000] * 3, 8, 2)
    flat = [prime for row in first for prime in row], [prime for row in second for prime in row]
    assert [(p[0], p[-1], len(p)) for p in flat] == [(16000057, 16000463, 24), (16000477, 16000889, 24)]
    assert [sum(p) for p in flat] == [384_006_168, 384_016_682]
    assert pcg64_multipliers(0, 1, 99_092, 4) == (76632096046245, 4839876093313, 35959672319349, 73987337458391)
    assert pcg64_multipliers(0, 14, 99_092, 4) == (67716810739261, 51510806800915, 30921347202721, 82619226485591)
    layer = NgramHash(CompressedVocabulary.identity(99_092), pcg64_multipliers(0, 1, 99_092, 4), first, pad=2)
    assert (layer.rows, layer.orders, layer.heads, layer.window) == (384_006_168, (2, 3, 4), 8, 3)
    assert layer.offsets[:2] == (0, 16000057)
    assert layer.offsets[-1] == 384_006_168 - 16000463


def test_qwen38_flash_next_constants() -> None:
    (primes,) = assign_primes([20_000_000] * 2, 8, 1)
    assert (primes[0][0], primes[-1][-1], sum(map(sum, primes))) == (20000003, 20000171, 320_001_446)
    assert splitmix64_multipliers(1234, 0, 248_320, 3) == (23703573157769, 20109073645365, 8052911324071)


def test_demo_constants() -> None:
    first, second = assign_primes([646_400] * 2, 8, 2)
    assert first[0][:3] == (646403, 646411, 646421)
    assert [sum(map(sum, layer)) for layer in (first, second)] == [10_344_164, 10_348_242]


def test_primes_are_ascending_prime_and_never_reused() -> None:
    from sympy import isprime

    layers = assign_primes([101, 90, 101], 3, 4)
    flat = [prime for layer in layers for row in layer for prime in row]
    assert len(flat) == len(set(flat)) == 36
    assert all(isprime(prime) for prime in flat)
    assert all(
        list(row) == sorted(row) and row[0] >= start
        for layer in layers
        for row, start in zip(layer, (101, 90, 101), strict=True)
    )
    assert layers[0][0] == (101, 103, 107)  # a prime start is itself taken
    assert layers[0][1] == (97, 109, 113)  # those of an earlier order are passed over


@given(seed=st.integers(0, 10**6), layer=st.integers(0, 100), vocab=st.integers(1, 300_000))
def test_multipliers_are_odd_and_no_product_overflows(seed: int, layer: int, vocab: int) -> None:
    for rule in (pcg64_multipliers, splitmix64_multipliers):
        multipliers = rule(seed, layer, vocab, 4)
        assert all(m % 2 == 1 and m * (vocab - 1) < 2**63 for m in multipliers)


# -- the address ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 49), min_size=1, max_size=12),
    orders=st.integers(2, 5),
    heads=st.integers(1, 4),
    seed=st.integers(0, 999),
    rows=st.sampled_from([11, 1009, BIG]),
)
def test_slots_are_the_published_formula(tokens: list[int], orders: int, heads: int, seed: int, rows: int) -> None:
    token_map = np.random.default_rng(seed).integers(0, 30, 50)
    token_map[0] = 29  # so that the largest compressed id occurs
    vocabulary = CompressedVocabulary(token_map, tuple(map(str, range(30))))
    primes = assign_primes([rows] * (orders - 1), heads, 1)[0]
    ngram_hash = NgramHash(vocabulary, pcg64_multipliers(seed, 3, 30, orders), primes, pad=int(token_map[2]))
    slots = ngram_hash.slots(torch.tensor([tokens]))
    assert slots[0].tolist() == reference_slots(ngram_hash, tokens)
    flat = ngram_hash.rows_of_slots(slots)
    assert ngram_hash.addressed_rows(torch.tensor([tokens])).equal(flat)
    assert (flat - slots)[0, 0].tolist() == list(ngram_hash.offsets)
    assert int(flat.min()) >= 0
    assert int(flat.max()) < ngram_hash.rows


@pytest.mark.parametrize("heads", [1, 8])
def test_slots_are_the_mix_modulo_each_prime(heads: int) -> None:
    ngram_hash = build(heads=heads)
    mix = torch.randint(0, 2**63 - 1, (3, 40, 2), generator=torch.Generator().manual_seed(heads))
    before = mix.clone()
    expected = (mix.unsqueeze(-1) % torch.tensor(ngram_hash.primes)).flatten(-2)
    assert torch.equal(ngram_hash.slots_of_mix(mix), expected)
    assert torch.equal(mix, before)


def test_largest_ids_of_the_largest_vocabulary_are_exact() -> None:
    vocab = 248_320
    ngram_hash = build(orders=4, heads=3, vocab=vocab)
    tokens = [vocab - 1, 0, vocab - 2, vocab - 1, vocab - 1]
    assert ngram_hash.slots(torch.tensor([tokens]))[0].tolist() == reference_slots(ngram_hash, tokens)


@pytest.mark.parametrize("back", range(5))
def test_changing_a_token_changes_exactly_the_longer_orders(back: int) -> None:
    ngram_hash = build(orders=4, heads=3)
    generator = torch.Generator().manual_seed(back)
    tokens = torch.randint(3, 50, (64, 9), generator=generator)
    changed = tokens.clone()
    changed[:, 8 - back] = 3 + (tokens[:, 8 - back] - 3 + 1) % 47
    moved = (ngram_hash.slots(tokens) != ngram_hash.slots(changed)).unflatten(-1, (3, 3))  # [B, T, order, head]
    assert not moved[:, : 8 - back].any(), "an earlier address moved"
    at_end = moved[:, 8]
    for order in (2, 3, 4):
        assert bool(at_end[:, order - 2].all()) == (back < order)
        assert bool(at_end[:, order - 2].any()) == (back < order)


def test_heads_of_one_order_share_the_mix_and_differ_by_their_prime() -> None:
    ngram_hash = build(heads=4)
    tokens = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    mix = ngram_hash.mix(ngram_hash.compress(tokens))
    slots = ngram_hash.slots(tokens).unflatten(-1, (2, 4))
    for n in range(2):
        for k in range(4):
            assert torch.equal(slots[..., n, k], mix[..., n] % ngram_hash.primes[n][k])


def test_the_pad_before_a_text_is_a_compressed_id() -> None:
    token_map = np.array([3, 2, 1, 0, 3])
    vocabulary = CompressedVocabulary(token_map, tuple("abcd"))
    primes, multipliers = assign_primes([BIG, BIG], 1, 1)[0], pcg64_multipliers(0, 1, 4, 3)
    ngram_hash = NgramHash(vocabulary, multipliers, primes, pad=int(token_map[2]))
    with_pads = ngram_hash.slots(torch.tensor([[2, 2, 4, 1]]))[:, 2:]  # raw pad 2, compressed 1, written out
    assert torch.equal(ngram_hash.slots(torch.tensor([[4, 1]])), with_pads)
    uncompressed_pad = NgramHash(vocabulary, multipliers, primes, pad=2)
    assert not torch.equal(uncompressed_pad.slots(torch.tensor([[4, 1]])), with_pads)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 9), min_size=2, max_size=14),
    cut=st.integers(1, 13),
    orders=st.integers(2, 4),
    boundary=st.sampled_from(["none", "reset"]),
)
def test_an_address_needs_only_the_window_before_it(tokens: list[int], cut: int, orders: int, boundary: str) -> None:
    ngram_hash = build(orders=orders, vocab=10, boundary=boundary, eos=7, pad=7)
    ids = torch.tensor([tokens])
    cut = min(cut, len(tokens) - 1)
    whole = ngram_hash.mix(ngram_hash.compress(ids))
    padded = torch.cat([ids.new_full((1, ngram_hash.window), 7), ids[:, :cut]], dim=1)
    later = ngram_hash.mix(ids[:, cut:], before=padded[:, -ngram_hash.window :])
    assert torch.equal(whole[:, cut:], later)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 5), min_size=1, max_size=14), orders=st.integers(2, 4), pad=st.sampled_from([5, 1])
)
def test_reset_hashes_each_text_as_if_it_stood_alone(tokens: list[int], orders: int, pad: int) -> None:
    eos = 5
    ngram_hash = build(orders=orders, vocab=6, boundary="reset", eos=eos, pad=pad)
    alone: list[list[int]] = []
    text: list[int] = []
    for token in tokens:  # a text ends with its eos, which still belongs to it
        text.append(token)
        if token == eos:
            alone, text = alone + reference_slots(ngram_hash, text), []
    alone += reference_slots(ngram_hash, text)
    assert ngram_hash.slots(torch.tensor([tokens]))[0].tolist() == alone


def test_without_reset_a_window_reaches_over_the_end_of_a_text() -> None:
    ids = torch.tensor([[1, 5, 2]])
    straight, reset = build(vocab=6), build(vocab=6, boundary="reset", eos=5)
    assert torch.equal(straight.slots(ids)[:, :2], reset.slots(ids)[:, :2])
    assert not torch.equal(straight.slots(ids)[:, 2], reset.slots(ids)[:, 2])


# -- refusals -------------------------------------------------------------------------------------------------------


def test_ids_outside_the_vocabulary_are_named() -> None:
    for bad in (-3, 50, 999):
        with pytest.raises(ValueError, match=rf"\[0, 50\), found {bad}$"):
            build().slots(torch.tensor([[1, bad]]))


def test_shapes_that_describe_no_layer_are_refused() -> None:
    vocabulary = CompressedVocabulary.identity(5)
    with pytest.raises(ValueError, match="one row of primes per order, 2 for 3 multipliers; found 1"):
        NgramHash(vocabulary, (1, 3, 5), ((7,),), pad=0)
    with pytest.raises(ValueError, match="same number of heads"):
        NgramHash(vocabulary, (1, 3, 5), ((7,), (11, 13)), pad=0)
    with pytest.raises(ValueError, match="eos=None"):
        NgramHash(vocabulary, (1, 3), ((7,),), pad=0, boundary="reset")


def test_with_primes_changes_the_table_and_nothing_else() -> None:
    ngram_hash = build(rows=1009)
    small = ngram_hash.with_primes(((11, 13), (17, 19)))
    tokens = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(1))
    ngram_hash.slots(tokens)  # fills the per-device constants, which must not be inherited
    assert (small.rows, small.sizes, small.multipliers) == (60, (11, 13, 17, 19), ngram_hash.multipliers)
    assert small.slots(tokens)[0].tolist() == reference_slots(small, tokens[0].tolist())
