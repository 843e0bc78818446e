"""Items that need no files: the bundled sentences, repeated random words, sums."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer

from engram_interp.probes.task_items import Item

_PERIOD = 20  # random words before they repeat: longer than any n-gram or convolution window
_SHOTS = 3


def gallery_items(kind: str, limit: int) -> list[Item]:
    """Complete the last word of a marked name or phrase of the gallery, after the sentence so far."""
    from engram_interp.gallery.sentences import load_gallery

    items = []
    for sentence in load_gallery():
        for number, span in enumerate(s for s in sentence.spans if s.kind == kind):
            start = sentence.text.rfind(" ", span.start, span.end)
            if start <= span.start:
                continue  # written without spaces
            last = sentence.text[start : span.end]
            items.append(Item(f"{sentence.id}.{number}", sentence.text[:start], (last,), sentence.id))
    return items[:limit]


def induction_items(tokenizer: Tokenizer, limit: int, rng: np.random.Generator) -> list[Item]:
    """Random words, then the same words again up to a random one: which comes next? No n-gram of it was ever trained
    on.

    Raises: ValueError when the tokenizer has too few whole words.
    """
    words = word_tokens(tokenizer, 2 * _PERIOD)
    items = []
    for number in range(limit):
        sequence = rng.choice(words, size=_PERIOD, replace=False).tolist()
        cut = int(rng.integers(4, _PERIOD))
        items.append(Item(f"induction.{number}", (*sequence, *sequence[:cut]), ((sequence[cut],),)))
    return items


def word_tokens(tokenizer: Tokenizer, least: int) -> list[int]:
    """The ids that are whole words with the space before them.

    Raises: ValueError when there are fewer than `least`.
    """
    words = [i for i in range(tokenizer.get_vocab_size()) if _is_word(tokenizer.decode([i]))]
    if len(words) < least:
        raise ValueError(f"expected a tokenizer with at least {least} whole words, found {len(words)}")
    return words


def _is_word(text: str) -> bool:
    return len(text) > 2 and text[0] == " " and text[1:].isalpha() and text[1:].isascii()


def arithmetic_items(limit: int, rng: np.random.Generator) -> list[Item]:
    """Sums up to 40 after three solved ones; the right answer against three near ones."""
    items = []
    for number in range(limit):
        pairs = rng.integers(1, 21, size=(_SHOTS + 1, 2)).tolist()
        solved = ", ".join(f"{a} + {b} = {a + b}" for a, b in pairs[:-1])
        a, b = pairs[-1]
        near = [a + b + d for d in (-10, -2, -1, 1, 2, 10) if a + b + d > 0]
        wrong = rng.choice(near, size=3, replace=False).tolist()
        items.append(Item(f"arithmetic.{number}", f"{solved}, {a} + {b} =", tuple(f" {n}" for n in (a + b, *wrong))))
    return items
