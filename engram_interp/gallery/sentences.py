"""What is in the gallery? `sentences.jsonl`, one JSON object per line, read strictly.

A line is `{"id": "g001", "text": ..., "category": ..., "spans": [{"text", "kind", "start", "end"}, ...]}` with
character offsets `text[start:end] == span.text`. Checked on reading: ids g001, g002, ... in file order,
categories sorted, texts unique and of 8 to 30 words, spans of two or more words, in the order of the text, apart from
one another and on word boundaries, and no entity in a `control` sentence.
Cost: a few milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

KINDS = ("entity", "phrase")
CONTROL = "control"
_WORDS = range(8, 31)
_SENTENCE_FIELDS = {"id", "text", "category", "spans"}
_SPAN_FIELDS = {"text", "kind", "start", "end"}

SENTENCES = Path(__file__).with_name("sentences.jsonl")


@dataclass(frozen=True)
class Span:
    """A marked stretch of a sentence: `text` is the characters `[start, end)`; `kind` is `entity` or `phrase`."""

    text: str
    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class GallerySentence:
    """One sentence with its marked spans in the order of the text."""

    id: str
    text: str
    category: str
    spans: tuple[Span, ...]


def load_gallery() -> tuple[GallerySentence, ...]:
    """The sentences shipped with the package, sorted by category.

    Raises:
        ValueError: the file breaks a rule of this module; the message names the line.
    """
    text = SENTENCES.read_text(encoding="utf-8")
    return parse_gallery(text.split("\n")[:-1])


def parse_gallery(lines: Iterable[str]) -> tuple[GallerySentence, ...]:
    """Sentences from JSON lines (see the module's text for the rules).

    Raises:
        ValueError: a line breaks a rule; the message names the line, counted from 1.
    """
    sentences: list[GallerySentence] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            sentence = _sentence(line)
            _check_place(sentence, number, sentences[-1].category if sentences else "")
            if sentence.text in seen:
                raise ValueError(f"text must be new, found that of line {seen[sentence.text]}")
        except ValueError as error:
            raise ValueError(f"gallery line {number}: {error}") from error
        seen[sentence.text] = number
        sentences.append(sentence)
    return tuple(sentences)


def _sentence(line: str) -> GallerySentence:
    record = _fields(json.loads(line), _SENTENCE_FIELDS, "a sentence")
    for name in ("id", "text", "category"):
        if not isinstance(record[name], str) or not record[name].strip():
            raise ValueError(f"{name} must be a non-empty string, found {record[name]!r}")
    text, spans = record["text"], record["spans"]
    if len(text.split()) not in _WORDS:
        raise ValueError(f"text must have {_WORDS[0]} to {_WORDS[-1]} words, found {len(text.split())}")
    if text != " ".join(text.split()):
        raise ValueError("text must have single spaces between words and none around them")
    if not isinstance(spans, list):
        raise ValueError(f"spans must be a list, found {type(spans).__name__}")
    marked = tuple(_span(span, text) for span in spans)
    for before, after in pairwise(marked):
        if after.start < before.end:
            raise ValueError(f"spans must be in order and apart, found {after.text!r} after {before.text!r}")
    return GallerySentence(record["id"], text, record["category"], marked)


def _span(value: object, text: str) -> Span:
    record = _fields(value, _SPAN_FIELDS, "a span")
    words, kind, start, end = (record[name] for name in ("text", "kind", "start", "end"))
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, found {kind!r}")
    if type(start) is not int or type(end) is not int or not 0 <= start < end <= len(text):
        raise ValueError(f"span must have integers 0 <= start < end <= {len(text)}, found {start!r} and {end!r}")
    if words != text[start:end]:
        raise ValueError(f"span {words!r} must be at its offsets, found {text[start:end]!r} at {start} to {end}")
    if len(words.split()) < 2 or words != words.strip():
        raise ValueError(f"span must have two or more words and no outer space, found {words!r}")
    if _inside_word(text, start) or _inside_word(text, end):
        raise ValueError(f"span must start and end at word boundaries, found {words!r}")
    return Span(words, kind, start, end)


def _inside_word(text: str, at: int) -> bool:
    return 0 < at < len(text) and text[at - 1].isalnum() and text[at].isalnum()


def _check_place(sentence: GallerySentence, number: int, category_before: str) -> None:
    if sentence.id != f"g{number:03d}":
        raise ValueError(f"id must be g{number:03d}, found {sentence.id!r}")
    if sentence.category < category_before:
        raise ValueError(f"categories must be sorted, found {sentence.category!r} after {category_before!r}")
    if sentence.category == CONTROL and any(span.kind == "entity" for span in sentence.spans):
        raise ValueError("a control sentence must have no entity span")


def _fields(value: object, expected: set[str], what: str) -> dict:
    if not isinstance(value, dict) or set(value) != expected:
        found = ", ".join(sorted(value)) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{what} must be an object with {', '.join(sorted(expected))}, found {found}")
    return value
