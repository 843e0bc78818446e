"""Which tokens are alike enough to be averaged together?

Masks over the tokens of one text, in one place so that every probe means the same by them:

- `entity-final`, `phrase-final`: the token that completes a marked name or set phrase, where the paper reads hidden
  states;
- `copy`: the bigram (this token, next token) occurred earlier in the text, so an induction head could predict the next
  one;
- frequency bins: how often the n-gram that *ends* at the token, the key of a memory read, occurs in a reference corpus;
- `rest`: neither entity-final nor phrase-final nor copy.

Misleads: strata overlap (an entity name repeated in a text is both entity-final and copy), and counts describe the
reference corpus that was passed, not what a model saw in training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Int64
from tokenizers import Tokenizer

from engram_interp.gallery import GallerySentence, entity_final_positions

FREQUENCY_EDGES = (0, 1, 10, 100)  # bins: never, 1 to 9, 10 to 99, 100 and more


def as_text(item: str | GallerySentence) -> str:
    """The text of a plain text or a gallery sentence."""
    return item if isinstance(item, str) else item.text


def span_final(tokenizer: Tokenizer, item: str | GallerySentence, kind: str = "entity") -> Bool[np.ndarray, " T"]:
    """Tokens that complete a marked entity or phrase, in the text encoded without special tokens; none if plain.

    Raises: ValueError for an unknown kind, or a span that no token completes.
    """
    encoding = tokenizer.encode(as_text(item), add_special_tokens=False)
    mask = np.zeros(len(encoding.ids), dtype=bool)
    if not isinstance(item, str):
        mask[entity_final_positions(item, encoding.offsets, kind)] = True
    return mask


def copied(tokens: Int64[np.ndarray, " T"]) -> Bool[np.ndarray, " T"]:
    """Positions whose bigram (token, next token) occurred earlier in the text; never the last position."""
    mask = np.zeros(len(tokens), dtype=bool)
    seen: set[tuple[int, int]] = set()
    for t, pair in enumerate(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True)):
        mask[t] = pair in seen
        seen.add(pair)
    return mask


@dataclass(frozen=True)
class NgramCounts:
    """How often each n-gram of token ids occurs in a reference corpus."""

    order: int
    counts: Mapping[tuple[int, ...], int]

    @classmethod
    def of(cls, documents: Iterable[Int64[np.ndarray, " _"] | Sequence[int]], order: int = 2) -> NgramCounts:
        """Count the n-grams inside each document.

        Raises: ValueError for an order below 1 or a corpus without a single n-gram.
        """
        if order < 1:
            raise ValueError(f"expected an order of at least 1, found {order}")
        counts: Counter[tuple[int, ...]] = Counter()
        for document in documents:
            ids = list(map(int, document))
            counts.update(zip(*(ids[i:] for i in range(order)), strict=False))
        if not counts:
            raise ValueError(f"expected a reference corpus with at least one {order}-gram, found none")
        return cls(order, counts)

    def ending_at(self, tokens: Int64[np.ndarray, " T"]) -> Int64[np.ndarray, " T"]:
        """Count of the n-gram that ends at each token; -1 where the text is too young to have one."""
        ids = tokens.tolist()
        found = [self.counts.get(tuple(ids[t - self.order + 1 : t + 1]), 0) for t in range(self.order - 1, len(ids))]
        return np.asarray([-1] * min(self.order - 1, len(ids)) + found, dtype=np.int64)

    def bins(self, tokens: Int64[np.ndarray, " T"]) -> dict[str, Bool[np.ndarray, " T"]]:
        """One mask per frequency bin, named like `2-gram 10-99`."""
        masks = count_bins(self.ending_at(tokens), FREQUENCY_EDGES)
        return {f"{self.order}-gram {label}": mask for label, mask in masks.items()}


def count_bins(counts: Int64[np.ndarray, " T"], edges: Sequence[int]) -> dict[str, Bool[np.ndarray, " T"]]:
    """One mask per bin of counts, which begins at an edge and ends before the next, named like `0`, `1-9`, `10+`."""
    masks = {}
    for low, high in pairwise(edges):
        masks[str(low) if high - low == 1 else f"{low}-{high - 1}"] = (counts >= low) & (counts < high)
    return masks | {f"{edges[-1]}+": counts >= edges[-1]}


def text_strata(
    tokenizer: Tokenizer,
    item: str | GallerySentence,
    tokens: Int64[np.ndarray, " T"],
    reference: NgramCounts | None = None,
) -> dict[str, Bool[np.ndarray, " T"]]:
    """Every mask for one text, over its tokens without special tokens.

    Raises: ValueError when `tokens` is not what the tokenizer makes of the text.
    """
    entity, phrase = (span_final(tokenizer, item, kind) for kind in ("entity", "phrase"))
    if len(entity) != len(tokens):
        raise ValueError(f"expected the text's own {len(entity)} tokens, found {len(tokens)}")
    copy = copied(tokens)
    masks = {"entity-final": entity, "phrase-final": phrase, "copy": copy, "rest": ~(entity | phrase | copy)}
    return masks | (reference.bins(tokens) if reference else {})
