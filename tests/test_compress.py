"""The compressed vocabulary: which tokens share a row, and that the ids are the published ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engram_interp.memory import CompressedVocabulary


def byte_level(tokens: list[str]) -> Tokenizer:
    """A tokenizer that has exactly these byte-level tokens (a leading space is written `Ġ`)."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def spell(text: str) -> str:
    """A text in the byte-level alphabet."""
    return "".join(
        piece for piece, _ in pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    )


@pytest.mark.parametrize(
    "variants",
    [
        ["The", " the", "THE", " The"],
        ["é", "E", "É", " e", "e"],  # accents and case
        ["ﬁ", "fi", " FI"],  # a ligature is its letters under NFKC
        ["  ", " ", "\n", "\t \r\n"],  # all white space is one space, which survives the strip
        ["１", "1"],  # full-width digits
    ],
)
def test_variants_of_a_word_share_one_id(variants: list[str]) -> None:
    vocabulary = CompressedVocabulary.from_tokenizer(byte_level([spell(v) for v in ["other", *variants]]))
    assert vocabulary.token_map.tolist() == [0] + [1] * len(variants)
    assert vocabulary.size == 2


@pytest.mark.parametrize(("one", "another"), [("cat", "cats"), ("a", "b"), (" ", "a"), (".", ","), ("ß", "ss")])
def test_different_words_keep_different_ids(one: str, another: str) -> None:
    vocabulary = CompressedVocabulary.from_tokenizer(byte_level([spell(one), spell(another)]))
    assert vocabulary.token_map.tolist() == [0, 1]


def test_ids_are_given_in_order_of_first_appearance() -> None:
    words = ["b", "a", "B", "c", "A", "d"]
    vocabulary = CompressedVocabulary.from_tokenizer(byte_level(words))
    assert vocabulary.token_map.tolist() == [0, 1, 0, 2, 1, 3]
    assert vocabulary.texts == ("b", "a", "c", "d")
    assert (vocabulary.size, vocabulary.raw_size) == (4, 6)


def test_fragments_of_a_character_keep_their_own_token() -> None:
    first, second = (chr(0xE9), chr(0xE8))  # bytes E9, E8: no text alone
    vocabulary = CompressedVocabulary.from_tokenizer(byte_level([first, second, "e"]))
    assert vocabulary.token_map.tolist() == [0, 1, 2]
    assert vocabulary.texts[:2] == (first, second)


def test_special_tokens_are_not_skipped() -> None:
    tokenizer = byte_level(["x", "y"])
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    assert CompressedVocabulary.from_tokenizer(tokenizer).texts == ("x", "y", "<bos>", "<eos>")


def test_identity_keeps_every_token() -> None:
    vocabulary = CompressedVocabulary.identity(7)
    assert vocabulary.token_map.tolist() == list(range(7))
    assert vocabulary.size == vocabulary.raw_size == 7


def test_recorded_token_map(shared: Path) -> None:
    tokenizer = Tokenizer.from_file(str(shared / "vectors" / "tokenizer_8192.json"))
    with np.load(shared / "vectors" / "demo_a.npz", allow_pickle=False) as recorded:
        expected = recorded["token_map"]
    vocabulary = CompressedVocabulary.from_tokenizer(tokenizer)
    np.testing.assert_array_equal(vocabulary.token_map, expected)
    assert vocabulary.size == 6660
    assert sorted(set(vocabulary.token_map.tolist())) == list(range(6660))
