"""Items that ask for something far back: many needles with many queries, and variables that name variables.

After RULER's multi-query needle and variable tracking (Hsieh et al. 2024), with words of one token and the right answer against the
other values of the same context, so that a model which has learnt nothing scores 1/n and any use of the context shows. Misleads when
read as retrieval by exact match: a model may prefer the right value among those it saw without being able to say it.
"""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer

from engram_interp.probes.task_generated import word_tokens
from engram_interp.probes.task_items import Item

_HOPS = 2  # a variable, one that names it, one that names that


def needle_items(
    tokenizer: Tokenizer, limit: int, rng: np.random.Generator, *, length: int, needles: int = 4
) -> list[Item]:
    """`needles` facts in one context, one item for each: which value belongs to this key?

    Args: length: tokens of the prompt at the most, filled with bundled sentences; limit: items.
    Raises: ValueError when the facts alone do not fit.
    """
    items = []
    for number in range(-(-limit // needles)):
        words = _words(tokenizer, rng, 2 * needles)
        keys, values = words[:needles], words[needles:]
        facts = [f" The sign of{key} is{value}." for key, value in zip(keys, values, strict=True)]
        context = _buried(tokenizer, rng, facts, length - _tokens(tokenizer, f" The sign of{keys[0]} is"))
        for i, key in enumerate(keys):
            choices = (values[i], *values[:i], *values[i + 1 :])
            items.append(Item(f"needle{length}.{number}.{i}", f"{context} The sign of{key} is", choices, f"{number}"))
    return items[:limit]


def variable_items(
    tokenizer: Tokenizer, limit: int, rng: np.random.Generator, *, length: int, chains: int = 4
) -> list[Item]:
    """`chains` chains of assignments in one context, one item for each: what is the last variable of the chain?

    Args, Raises: as `needle_items`.
    """
    items = []
    for number in range(-(-limit // chains)):
        words = _words(tokenizer, rng, chains * (_HOPS + 2))
        grid = np.array(words).reshape(chains, _HOPS + 2)  # value, first variable, ...
        lines = [f" Let{grid[c, h + 1]} be{grid[c, h]}." for h in range(_HOPS + 1) for c in rng.permutation(chains)]
        context = _buried(tokenizer, rng, lines, length - _tokens(tokenizer, f" So{grid[0, -1]} is"))
        for c in range(chains):
            others = [str(value) for value in np.delete(grid[:, 0], c)]
            prompt = f"{context} So{grid[c, -1]} is"
            items.append(Item(f"variable{length}.{number}.{c}", prompt, (str(grid[c, 0]), *others), f"{number}"))
    return items[:limit]


def _words(tokenizer: Tokenizer, rng: np.random.Generator, count: int) -> list[str]:
    return [
        tokenizer.decode([i]) for i in rng.choice(word_tokens(tokenizer, count), size=count, replace=False).tolist()
    ]


def _tokens(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def _buried(tokenizer: Tokenizer, rng: np.random.Generator, lines: list[str], length: int) -> str:
    """The lines in their order among bundled sentences, as many as fit into `length` tokens."""
    from engram_interp.gallery.sentences import load_gallery

    room = length - sum(_tokens(tokenizer, line) for line in lines)
    if room < 0:
        raise ValueError(f"expected a length of at least {length - room} tokens for {len(lines)} lines, found {length}")
    filler = []
    for index in rng.permutation(len(sentences := load_gallery())).tolist():
        size = _tokens(tokenizer, text := f" {sentences[index].text}")
        if size > room:
            break
        room -= size
        filler.append(text)
    places = np.sort(rng.integers(0, len(filler) + 1, size=len(lines)))
    parts = []
    for gap in range(len(filler) + 1):
        parts += [line for line, place in zip(lines, places, strict=True) if place == gap]
        parts += filler[gap : gap + 1]
    return "".join(parts).strip()
