"""Is the gallery what its rules say, and is a name complete at the token a reader would point at?"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engram_interp.gallery import GallerySentence, Span, entity_final_positions, load_gallery, parse_gallery

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEXT = "Only Alexander the Great could tame the horse, by the way."
NAME = {"text": "Alexander the Great", "kind": "entity", "start": 5, "end": 24}
PHRASE = {"text": "by the way", "kind": "phrase", "start": 47, "end": 57}


def line(**changes: object) -> str:
    return json.dumps({"id": "g001", "text": TEXT, "category": "history", "spans": [NAME, PHRASE]} | changes)


def marked(text: str, *names: str) -> GallerySentence:
    spans = tuple(Span(name, "entity", text.index(name), text.index(name) + len(name)) for name in names)
    return GallerySentence("g001", text, "history", spans)


@pytest.fixture(scope="module")
def gallery() -> tuple[GallerySentence, ...]:
    return load_gallery()


def test_gallery_has_the_promised_size(gallery: tuple[GallerySentence, ...]):
    kinds = [span.kind for sentence in gallery for span in sentence.spans]
    nameless = [s for s in gallery if not any(span.kind == "entity" for span in s.spans)]
    assert len(gallery) >= 300
    assert kinds.count("entity") >= 350
    assert kinds.count("phrase") >= 60
    assert {s.category for s in nameless} == {"control"}
    assert len(nameless) >= 40


def test_control_sentences_hold_no_run_of_capitalised_words(gallery: tuple[GallerySentence, ...]):
    """A second look at the controls that does not rely on the marks."""
    for sentence in gallery:
        if sentence.category == "control":
            _, _, after_first_word = sentence.text.partition(" ")
            assert not re.search(r"\b[A-Z]\w+ (of |the )*[A-Z]\w+", after_first_word), sentence.text


def test_names_of_figure_7_are_marked(gallery: tuple[GallerySentence, ...]):
    names = {span.text for s in gallery if s.category == "figure-7" for span in s.spans}
    expected = {"Alexander the Great", "Milky Way", "By the way,", "Diana, Princess of Wales", "Four Great Inventions"}
    assert expected | {"Zhang Zhongjing"} <= names


def test_marks_cover_every_mention_of_a_listed_name(gallery: tuple[GallerySentence, ...]):
    """A name marked somewhere is marked wherever it occurs, alone or inside a longer marked name."""
    names = {span.text for s in gallery for span in s.spans if span.kind == "entity"}
    pattern = re.compile("|".join(rf"\b{re.escape(name)}(?!\w)" for name in sorted(names, key=len, reverse=True)))
    for sentence in gallery:
        for found in pattern.finditer(sentence.text):
            assert any(s.start <= found.start() and found.end() <= s.end for s in sentence.spans), sentence.text


def test_well_formed_line_is_read():
    spans = (Span("Alexander the Great", "entity", 5, 24), Span("by the way", "phrase", 47, 57))
    assert parse_gallery([line()]) == (GallerySentence("g001", TEXT, "history", spans),)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "line 1"),
        ("[]", "found list"),
        (line(note="x"), "found category, id, note"),
        (line(id="g002"), "id must be g001"),
        (line(text="Too short."), "8 to 30 words, found 2"),
        (line(text=TEXT.replace("Only ", "Only  ")), "single spaces"),
        (line(category=" "), "category must be"),
        (line(category="control"), "no entity span"),
        (line(spans={}), "spans must be a list"),
        (line(spans=[PHRASE, NAME]), "in order and apart"),
        (line(spans=[NAME, NAME]), "in order and apart"),
        (line(spans=[NAME | {"kind": "place"}]), "kind must be"),
        (line(spans=[NAME | {"kind": ["entity"]}]), "kind must be"),
        (line(spans=[NAME | {"start": 6}]), "must be at its offsets"),
        (line(spans=[NAME | {"end": 99}]), "start < end"),
        (line(spans=[NAME | {"start": True}]), "integers"),
        (line(spans=[NAME | {"text": "Great", "start": 19}]), "two or more words"),
        (line(spans=[NAME | {"text": "Alexander the Grea", "end": 23}]), "word boundaries"),
        (line(spans=[{"text": "x"}]), "a span must be an object"),
    ],
)
def test_bad_line_is_refused_with_its_number(bad: str, message: str):
    with pytest.raises(ValueError, match=r"gallery line 1: .*") as caught:
        parse_gallery([bad])
    assert message in str(caught.value)


def test_later_lines_are_checked_against_earlier_ones():
    with pytest.raises(ValueError, match=r"line 2: text must be new, found that of line 1"):
        parse_gallery([line(), line(id="g002")])
    with pytest.raises(ValueError, match=r"line 2: categories must be sorted"):
        parse_gallery([line(), line(id="g002", category="arts")])


def test_final_positions_by_hand():
    sentence = parse_gallery([line()])[0]
    words = [(m.start(), m.end()) for m in re.finditer(r" ?\w+|[,.]", TEXT)]  # leading spaces, as byte-level BPE
    assert entity_final_positions(sentence, words) == [3]
    assert entity_final_positions(sentence, words, kind="phrase") == [11]
    assert entity_final_positions(sentence, [(0, 0), *words, (0, 0)]) == [4]  # special tokens around the text


def test_last_token_of_a_character_split_into_bytes_completes_the_name():
    sentence = marked("Old São José stands by the sea in Brazil.", "São José")
    offsets = [(0, 3), (3, 7), (7, 11), (11, 12), (11, 12), (12, 19)]
    assert entity_final_positions(sentence, offsets) == [4]


def test_final_positions_refuse_what_they_cannot_answer():
    sentence = parse_gallery([line()])[0]
    with pytest.raises(ValueError, match=r"no token holds character 23, the last of 'Alexander the Great'"):
        entity_final_positions(sentence, [(0, 4), (4, 14)])
    with pytest.raises(ValueError, match=r"58 characters, found a token that ends at 60"):
        entity_final_positions(sentence, [(0, 60)])
    with pytest.raises(ValueError, match="kind must be one of entity, phrase"):
        entity_final_positions(sentence, [(0, 4)], kind="name")


def check_against_decoding(gallery: tuple[GallerySentence, ...], tokenizer: Tokenizer) -> None:
    """The oracle: the shortest run of tokens whose decoded text holds the name's end finishes at the answer."""
    for sentence in gallery:
        ids, offsets = (lambda e: (e.ids, e.offsets))(tokenizer.encode(sentence.text, add_special_tokens=False))
        names = [span for span in sentence.spans if span.kind == "entity"]
        decoded = [tokenizer.decode(ids[:count], skip_special_tokens=False) for count in range(1, len(ids) + 1)]
        expected = [next(i for i, d in enumerate(decoded) if d.startswith(sentence.text[: s.end])) for s in names]
        found = entity_final_positions(sentence, offsets)
        assert found == expected, sentence
        assert all(offsets[at][0] > span.start for at, span in zip(found, names, strict=True)), sentence


def test_final_positions_agree_with_decoding(gallery: tuple[GallerySentence, ...], tokenizer: Tokenizer):
    check_against_decoding(gallery, tokenizer)


def test_final_positions_agree_with_decoding_under_the_8192_vocabulary(
    gallery: tuple[GallerySentence, ...], shared: Path
):
    tokenizers = pytest.importorskip("tokenizers")
    check_against_decoding(gallery, tokenizers.Tokenizer.from_file(str(shared / "vectors" / "tokenizer_8192.json")))
