"""Which residual vectors stand for a text, and what are they in several models?

Rows are read at chosen tokens of every residual site, streams reduced by the model's own rule. The start token is never
a row: its massive activations alone make unrelated models look identical (CKA 1.000). One row per document is the
cleanest design; several are allowed, and then keep their document, which the estimators need. Cost: one forward per
text; memory: rows * sites * D floats. Misleads when the same name ends many texts: its rows are then not independent
although the documents differ.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer

from engram_interp.gallery import GallerySentence, Span, entity_final_positions
from engram_interp.models.protocol import Decoder
from engram_interp.models.text import start_tokens, windows
from engram_interp.shapes import Float, Int64, Tensor

Positions = Literal["entity_final", "one_per_document", "all"]
MarkedText = str | tuple[str, Sequence[tuple[int, int]]] | GallerySentence


@dataclass(frozen=True)
class RowPlan:
    """Which tokens of which texts become rows. `tokens[t]`: indices into text t, start token not counted."""

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    dropped: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(map(len, self.tokens))

    @property
    def documents(self) -> Int64[np.ndarray, " n"]:
        """Document of every row; equal texts are one document."""
        first: dict[str, int] = {}
        index = [first.setdefault(text, len(first)) for text in self.texts]
        return np.repeat(np.array(index, dtype=np.int64), [len(t) for t in self.tokens])


def plan_rows(
    tokenizer: Tokenizer,
    texts: Sequence[MarkedText],
    positions: Positions,
    *,
    max_rows: int,
    rng: np.random.Generator,
    skip_first: bool = False,
) -> RowPlan:
    """Choose the rows.

    Args: texts: plain texts, `(text, [(start, end), ...])` with character spans of entities, or gallery sentences.
        positions: the last token of every entity; one token per text (the end of its last entity, else one
        drawn at random); or every token.
        max_rows: above it every text keeps an equal, random share. skip_first: leave out token 0 (models without a
        start token).
    Raises: ValueError when no row is left: no texts, empty texts, or `entity_final` without spans.
    """
    if positions not in ("entity_final", "one_per_document", "all"):
        raise ValueError(f"expected positions entity_final, one_per_document or all, found {positions!r}")
    marked = [_sentence(text) for text in texts]
    chosen, lengths = [], []
    for sentence in marked:
        encoding = tokenizer.encode(sentence.text, add_special_tokens=False)
        lengths.append(len(encoding.ids))
        chosen.append(_choose(sentence, encoding.offsets, positions, int(skip_first), rng))
    total = sum(map(len, chosen))
    if total == 0:
        kind = "texts with marked entities" if positions == "entity_final" and marked else "at least one non-empty text"
        raise ValueError(f"expected {kind}, found none in {len(marked)} texts")
    if total > max_rows:
        share = max(1, math.floor(max_rows / len(marked)))
        chosen = [sorted(rng.choice(t, min(share, len(t)), replace=False).tolist()) if t else t for t in chosen]
    kept = sum(map(len, chosen))
    return RowPlan(tuple(s.text for s in marked), tuple(map(tuple, chosen)), tuple(lengths), total - kept)


@torch.no_grad()
def read_rows(model: Decoder, plan: RowPlan) -> list[Float[Tensor, "n D"]]:
    """The planned rows at every residual site of a model, float32, one tensor per site.

    A text beyond the context is read in overlapping windows.
    Raises: ValueError for a non-finite activation (model, site, text and token named).
    """
    sites: list[list[Tensor]] = [[] for _ in range(model.layers + 1)]
    start = len(start_tokens(model))
    for number, (text, chosen) in enumerate(zip(plan.texts, plan.tokens, strict=True)):
        covered = 0
        for window in windows(model, text) if chosen else ():
            first = max(window.keep.start, start)
            here = [t for t in chosen if covered <= t < covered + window.keep.stop - first]
            if here:
                _read_window(model, window.tokens, [first + t - covered for t in here], here, number, sites)
            covered += window.keep.stop - first
    return [torch.cat(rows) for rows in sites]


def _read_window(
    model: Decoder, tokens: Tensor, positions: list[int], chosen: list[int], number: int, sites: list[list[Tensor]]
) -> None:
    for site, hidden in enumerate(model.residuals(tokens)):
        rows = _reduced(model, hidden)[0, torch.tensor(positions)].float().cpu()
        finite = rows.isfinite().all(1)
        if not finite.all():
            token = chosen[int((~finite).nonzero()[0])]
            raise ValueError(
                f"expected finite activations, found NaN or infinity in {model.identity.name} at residual "
                f"site {site}, text {number}, token {token}"
            )
        sites[site].append(rows)


def _reduced(model: Decoder, hidden: Tensor) -> Tensor:
    """One vector per token by the model's own rule; a single stream needs none."""
    return hidden.squeeze(2) if hidden.shape[2] == 1 else model.reduce_streams(hidden)


def has_start_token(model: Decoder) -> bool:
    """Whether the model puts a token of its own before a text."""
    return len(start_tokens(model)) > 0


def require_same_tokenizer(models: Sequence[Decoder]) -> None:
    """Layers of two models can be compared only on the same tokens.

    Raises: ValueError naming the two models and the hashes of their tokenizers.
    """
    first = models[0]
    for other in models[1:]:
        ours, theirs = tokenizer_hash(first.tokenizer), tokenizer_hash(other.tokenizer)
        if ours != theirs:
            raise ValueError(
                f"expected models with the same tokenizer, found {first.identity.name} ({ours[:12]}) and "
                f"{other.identity.name} ({theirs[:12]})"
            )


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of what a tokenizer does to a text; settings for padding and truncation do not count."""
    content = json.loads(tokenizer.to_str())
    kept = {k: v for k, v in content.items() if k not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _sentence(text: MarkedText) -> GallerySentence:
    if isinstance(text, GallerySentence):
        return text
    plain, spans = (text, ()) if isinstance(text, str) else text
    for start, end in spans:
        if not 0 <= start < end <= len(plain):
            raise ValueError(f"expected spans inside a text of {len(plain)} characters, found ({start}, {end})")
    marks = tuple(Span(plain[a:b], "entity", a, b) for a, b in spans)
    return GallerySentence(plain[:40], plain, "", marks)


def _choose(
    sentence: GallerySentence,
    offsets: list[tuple[int, int]],
    positions: Positions,
    first: int,
    rng: np.random.Generator,
) -> list[int]:
    """Tokens of one text, none before `first`."""
    if positions == "all":
        return list(range(first, len(offsets)))
    finals = sorted({t for t in entity_final_positions(sentence, offsets) if t >= first})
    if positions == "entity_final":
        return finals
    # Not the last token: texts end in the same full stop, and equal tokens do not vary at the embedding.
    return finals[-1:] or ([int(rng.integers(first, len(offsets)))] if len(offsets) > first else [])
