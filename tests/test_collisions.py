"""Addresses, n-gram counts and collisions equal a brute-force recount under the same hash."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from engram_interp.memory import CompressedVocabulary, NgramHash
from engram_interp.memory.access import expected_colliding, load_histogram
from engram_interp.memory.address import (
    address_of_row,
    addresses_of_ngram,
    compress,
    mixes,
    ngram_of_text,
    ngram_text,
    windows,
)
from engram_interp.memory.ngram_counts import NgramTable, count_ngrams, merge, readers_of_slot
from engram_interp.memory.ngram_index import NgramIndex, NgramIndexError, build_index
from engram_interp.models.house import HouseModel
from engram_interp.probes.collisions import slot_collisions
from engram_interp.probes.memory_rows import access_report
from engram_interp.probes.memory_table import lookup

MULTIPLIERS = (60_013, 7_919, 104_729)
PRIMES = ((11, 13), (17, 19))
RULES = [{}, {"boundary": "reset", "eos": 3}, {"window_rule": "engram_peft_1_2"}]


def small_hash(**rule: object) -> NgramHash:
    return NgramHash(CompressedVocabulary.identity(9), MULTIPLIERS, PRIMES, pad=2, **rule)


@pytest.fixture
def corpus() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 9, length) for length in (1, 2, 3, 40, 40, 25)]


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=["demo", "reset", "engram-peft"])
def test_an_ngram_addresses_the_slots_the_hash_reads(rule: dict, corpus: list[np.ndarray]) -> None:
    ngram_hash = small_hash(**rule)
    for tokens in corpus:
        slots = ngram_hash.slots(torch.from_numpy(tokens)[None])[0]
        rows = ngram_hash.rows_of_slots(slots)
        for n, window in enumerate(windows(ngram_hash, compress(ngram_hash, tokens))):
            for t in range(len(tokens)):
                found = addresses_of_ngram(ngram_hash, 5, window.ids[t].tolist())
                assert [a.slot for a in found] == slots[t, 2 * n : 2 * n + 2].tolist()
                assert [a.row for a in found] == rows[t, 2 * n : 2 * n + 2].tolist()
                assert all(address_of_row(ngram_hash, 5, a.row) == a for a in found)


def test_windows_are_complete_where_no_pad_was_put() -> None:
    two, three = windows(small_hash(boundary="reset", eos=3), np.array([5, 6, 3, 7, 8]))
    assert two.ids.tolist() == [[2, 5], [5, 6], [6, 3], [2, 7], [7, 8]]
    assert three.ids.tolist() == [[2, 2, 5], [2, 5, 6], [5, 6, 3], [2, 2, 7], [2, 7, 8]]
    assert two.complete.tolist() == [False, True, True, False, True]
    assert three.complete.tolist() == [False, False, True, False, False]


def test_addresses_that_cannot_be_are_refused() -> None:
    ngram_hash = small_hash()
    with pytest.raises(ValueError, match=r"\[0, 60\), found 60"):
        address_of_row(ngram_hash, 0, 60)
    with pytest.raises(ValueError, match=r"\[2, 3\] tokens, found 1"):
        addresses_of_ngram(ngram_hash, 0, [1])
    with pytest.raises(ValueError, match=r"\[0, 9\), found 9"):
        addresses_of_ngram(ngram_hash, 0, [1, 9])


def test_an_ngram_reads_back_from_its_text(tiny_engram: HouseModel) -> None:
    vocabulary = tiny_engram.vocabulary
    generator = np.random.default_rng(1)
    for _ in range(200):
        ngram = tuple(generator.integers(0, vocabulary.size, 3).tolist())
        assert ngram_of_text(vocabulary, ngram_text(vocabulary, ngram)) == ngram
    with pytest.raises(ValueError, match="'nowhere-a-token'"):
        ngram_of_text(vocabulary, "the | nowhere-a-token")


# -- counting a corpus -------------------------------------------------------------------------------------------------


def brute_counts(ngram_hash: NgramHash, corpus: list[np.ndarray], n: int) -> Counter:
    found: Counter = Counter()
    for tokens in corpus:
        compressed = compress(ngram_hash, tokens)
        mix = mixes(ngram_hash, compressed)[:, n]
        found.update(
            (*ids, int(m)) for ids, m in zip(windows(ngram_hash, compressed)[n].ids.tolist(), mix, strict=True)
        )
    return found


def as_counter(tables: list[NgramTable]) -> Counter:
    rows = [
        (*ids, mix, count)
        for t in tables
        for ids, mix, count in zip(t.ids.tolist(), t.mix.tolist(), t.count.tolist(), strict=True)
    ]
    assert len({row[:-1] for row in rows}) == len(rows)  # every n-gram in one place
    return Counter({row[:-1]: row[-1] for row in rows})


@pytest.mark.parametrize("chunk_tokens", [1, 30, 10**6])
@pytest.mark.parametrize("rule", RULES, ids=["demo", "reset", "engram-peft"])
def test_counts_in_memory_and_on_disk_equal_a_recount(
    rule: dict, corpus: list[np.ndarray], chunk_tokens: int, tmp_path: Path
) -> None:
    ngram_hash = small_hash(**rule)
    memory = count_ngrams(ngram_hash, corpus, chunk_tokens)
    build_index(tmp_path / "index", ngram_hash, corpus, parts=3, chunk_tokens=chunk_tokens)
    disk = NgramIndex(tmp_path / "index", ngram_hash)
    assert memory.tokens == disk.tokens == sum(map(len, corpus))
    for n, order in enumerate(ngram_hash.orders):
        expected = brute_counts(ngram_hash, corpus, n)
        assert as_counter(list(memory.parts(order))) == expected
        assert as_counter(list(disk.parts(order))) == expected


def test_ngrams_with_one_mix_stay_apart() -> None:
    ids = np.array([[1, 2], [3, 4], [1, 2], [3, 4], [0, 0]])
    mix = np.array([7, 7, 7, 7, 1])
    merged = merge([NgramTable(2, ids, mix, np.array([1, 10, 100, 1000, 5]))])
    assert as_counter([merged]) == {(0, 0, 1): 5, (1, 2, 7): 101, (3, 4, 7): 1010}


def test_a_slot_knows_its_readers(corpus: list[np.ndarray]) -> None:
    ngram_hash = small_hash()
    counts = count_ngrams(ngram_hash, corpus)
    found = readers_of_slot(counts, ngram_hash, 3, 1, 4)
    expected = Counter({ids: c for ids, c in brute_counts(ngram_hash, corpus, 1).items() if ids[-1] % 19 == 4})
    assert as_counter([found]) == expected
    assert found.count.tolist() == sorted(expected.values(), reverse=True)


def test_an_index_belongs_to_one_hash_and_appears_whole(corpus: list[np.ndarray], tmp_path: Path) -> None:
    build_index(tmp_path / "index", small_hash(), corpus)
    with pytest.raises(NgramIndexError, match="expected an index of hash"):
        NgramIndex(tmp_path / "index", small_hash(window_rule="engram_peft_1_2"))
    with pytest.raises(NgramIndexError, match="exists already"):
        build_index(tmp_path / "index", small_hash(), corpus)
    with pytest.raises(ValueError, match="at least one token"):
        build_index(tmp_path / "other", small_hash(), [])
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    (tmp_path / "index" / "order-2" / "part-003.parquet").write_bytes(b"PAR1")
    with pytest.raises(NgramIndexError, match=r"part-003\.parquet"):
        list(NgramIndex(tmp_path / "index", small_hash()).parts(2))


# -- collisions --------------------------------------------------------------------------------------------------------


def small_primes(model: HouseModel) -> HouseModel:
    """The same model with so few slots that n-grams meet in all heads (this changes addresses only)."""
    memory = model.engram(1)
    memory.ngram_hash = memory.ngram_hash.with_primes(((2, 3, 5, 7), (3, 5, 7, 11)))
    return model


def hashed_texts(model: HouseModel, texts: tuple[str, ...]) -> list[np.ndarray]:
    return [model.to_tokens(text)[0].numpy() for text in texts]


def test_collisions_equal_a_recount(fresh_engram: HouseModel, texts: tuple[str, ...]) -> None:
    model = small_primes(fresh_engram)
    ngram_hash = model.engram(1).ngram_hash
    result = slot_collisions(model, texts, block=1, inspect=2)
    corpus = hashed_texts(model, texts)
    for n, order in enumerate(ngram_hash.orders):
        distinct = list(brute_counts(ngram_hash, corpus, n))
        for k, prime in enumerate(ngram_hash.primes[n]):
            head = next(h for h in result.heads if (h.order, h.head) == (order, k))
            load = Counter(ids[-1] % prime for ids in distinct)
            assert (head.slots, head.ngrams, head.occupied) == (prime, len(distinct), len(load))
            assert head.colliding == sum(c for c in load.values() if c > 1)
            assert head.largest_load == max(load.values())
            assert int((np.arange(len(head.load)) * head.load).sum()) == len(distinct)
        groups = Counter(tuple(ids[-1] % p for p in ngram_hash.primes[n]) for ids in distinct)
        found = next(o for o in result.orders if o.order == order)
        assert (found.colliding, found.largest_group) == (
            sum(c for c in groups.values() if c > 1),
            max(groups.values()),
        )
        assert found.colliding > 0  # the case is not empty
        loads = [Counter(ids[-1] % p for ids in distinct) for p in ngram_hash.primes[n]]
        for sharing in (s for s in result.sharing if s.order == order):
            mix = int(mixes(ngram_hash, compress(ngram_hash, corpus[sharing.text]))[sharing.position, n])
            others = [load[mix % p] - 1 for load, p in zip(loads, ngram_hash.primes[n], strict=True)]
            assert sharing.shared_all == groups[tuple(mix % p for p in ngram_hash.primes[n])] - 1
            assert (sharing.shared_least, sharing.shared_most) == (min(others), max(others))
            assert sharing.shared_mean == pytest.approx(np.mean(others))
    assert len(result.sharing) == 2 * (len(corpus[0]) + len(corpus[1]))


def test_collisions_from_an_index_are_the_same(tiny_engram: HouseModel, texts: tuple[str, ...], tmp_path: Path) -> None:
    ngram_hash = tiny_engram.engram(3).ngram_hash
    index = build_index(tmp_path / "index", ngram_hash, hashed_texts(tiny_engram, texts), parts=4, chunk_tokens=20)
    direct = slot_collisions(tiny_engram, texts, block=3)
    indexed = slot_collisions(tiny_engram, texts, block=3, index=index)
    assert direct.table().equals(indexed.table())
    assert direct.sharing == indexed.sharing


def test_a_text_outside_the_corpus_is_not_taken_for_its_own_sharer(
    fresh_engram: HouseModel, texts: tuple[str, ...]
) -> None:
    model = small_primes(fresh_engram)
    ngram_hash = model.engram(1).ngram_hash
    corpus = hashed_texts(model, texts[1:])
    result = slot_collisions(model, texts[:1], block=1, index=count_ngrams(ngram_hash, corpus))
    tokens = hashed_texts(model, texts[:1])[0]
    absent = 0
    for n, order in enumerate(ngram_hash.orders):
        distinct = {ids[-1] for ids in brute_counts(ngram_hash, corpus, n)}
        own = mixes(ngram_hash, compress(ngram_hash, tokens))[:, n].tolist()
        absent += len(set(own) - distinct)
        expected = [sum(all(m % p == o % p for p in ngram_hash.primes[n]) for m in distinct - {o}) for o in own]
        assert [s.shared_all for s in result.sharing if s.order == order] == expected
    assert absent > 0


def test_expected_collisions_match_simulated_uniform_hashing() -> None:
    generator = np.random.default_rng(0)
    counts = [np.bincount(generator.integers(0, 500, 300), minlength=500) for _ in range(400)]
    colliding = np.array([c[c > 1].sum() for c in counts])
    assert abs(colliding.mean() - expected_colliding(300, 500)) < 4 * colliding.std() / 20
    histogram = load_histogram(counts[0])
    ones = np.array([(c == 1).sum() for c in counts])
    assert abs(ones.mean() - histogram.expected[1]) < 4 * ones.std() / 20
    assert (expected_colliding(1, 10), expected_colliding(5, 1)) == (0.0, 5.0)
    assert expected_colliding(2, 10) == pytest.approx(2 / 10)  # each of the two meets the other in a tenth of all cases


def test_a_model_without_memory_is_refused(
    tiny_moe: HouseModel, tiny_engram: HouseModel, texts: tuple[str, ...]
) -> None:
    for ask in (lambda m: slot_collisions(m, texts), lambda m: access_report(m, texts), lambda m: lookup(m, "a")):
        with pytest.raises(ValueError, match="no memory"):
            ask(tiny_moe)
    with pytest.raises(ValueError, match=r"block 2 has no memory; memories are in blocks \[1, 3\]"):
        slot_collisions(tiny_engram, texts, block=2)
    with pytest.raises(ValueError, match="at least one token"):
        slot_collisions(tiny_engram, [""])


def test_colliding_is_what_the_load_says(tiny_engram, texts):
    for head in slot_collisions(tiny_engram, texts[:2]).heads:
        ngrams = np.arange(len(head.load)) * head.load
        assert head.load[2] > 0
        assert head.ngrams == ngrams.sum()
        assert head.colliding == ngrams[2:].sum()
        assert head.occupied == head.load[1:].sum()
