"""At which token is a name complete? From character spans to the token that holds a span's last character.

A span `[start, end)` is complete at the last token `[a, b)` with `a <= end - 1 < b`. "Last" matters for byte-level BPE,
where the bytes of one character may be split over tokens that all report that character's offsets. A leading space
belongs to the token of the word after it, so it never moves a span's end; special tokens report the empty `(0, 0)`.
Cost: tokens x spans. Misleads when a tokenizer glues the name's last character to what follows ("Wales," as one token):
the position then also encodes the following text.
"""

from __future__ import annotations

from collections.abc import Sequence

from engram_interp.gallery.sentences import KINDS, GallerySentence, Span


def entity_final_positions(
    sentence: GallerySentence, offsets: Sequence[tuple[int, int]], kind: str = "entity"
) -> list[int]:
    """Index of the token that completes each span of `kind`, in the order of the text.

    Args:
        sentence: a gallery sentence; its text must be what was tokenized, from its first character.
        offsets: `(start, end)` character offsets per token, as `tokenizers.Encoding.offsets` gives them.
        kind: `entity` or `phrase`.

    Raises:
        ValueError: unknown `kind`, offsets beyond the text, or a span that no token completes (truncated tokens).
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, found {kind!r}")
    furthest = max((end for _, end in offsets), default=0)
    if furthest > len(sentence.text):
        raise ValueError(f"{sentence.id} has {len(sentence.text)} characters, found a token that ends at {furthest}")
    return [_completing_token(sentence, span, offsets) for span in sentence.spans if span.kind == kind]


def _completing_token(sentence: GallerySentence, span: Span, offsets: Sequence[tuple[int, int]]) -> int:
    for index in range(len(offsets) - 1, -1, -1):
        start, end = offsets[index]
        if start < span.end <= end:
            return index
    raise ValueError(f"{sentence.id}: no token holds character {span.end - 1}, the last of {span.text!r}")
