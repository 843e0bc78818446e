"""Which memory of a model is meant, how does it see a corpus, and which rows belong to which head?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from engram_interp.memory.hashing import NgramHash
from engram_interp.memory.row_reader import RowReader
from engram_interp.models.protocol import TokenisedModel
from engram_interp.models.site import EngramSite, sites_of
from engram_interp.models.text import show_tokens, start_tokens

_BATCH = 256  # texts tokenised at once


@runtime_checkable
class AddressedModel(TokenisedModel, Protocol):
    """A model whose memories can be addressed, with or without a backbone around them."""

    @property
    def engram_layers(self) -> tuple[int, ...]:
        """0-based blocks with a memory, ascending."""
        ...


@dataclass(frozen=True)
class Section:
    """The rows [start, stop) that one head of one order owns; order 0 is a table whose heads are not known."""

    order: int
    head: int
    start: int
    stop: int


def site_of(model: AddressedModel, block: int | None = None) -> EngramSite:
    """The memory of a block, by default the first.

    Raises: ValueError for a model without memory, or a block that has none.
    """
    sites = sites_of(model)
    if not sites:
        raise ValueError(f"model {model.identity.name!r} has no memory to look at (no Engram layer)")
    if block is None:
        return sites[0]
    for site in sites:
        if site.block == block:
            return site
    raise ValueError(f"block {block} has no memory; memories are in blocks {[site.block for site in sites]}")


def hash_of(site: EngramSite) -> NgramHash:
    """The hash that addresses this memory."""
    return site.engram.ngram_hash


def sections_of(source: EngramSite | RowReader) -> tuple[Section, ...]:
    """The heads of a memory, order-major; a bare table is one section."""
    if not isinstance(source, EngramSite):
        return (Section(0, 0, 0, source.rows),)
    sizes = [
        (order, head, prime)
        for order, row in zip(source.orders, source.primes, strict=True)
        for head, prime in enumerate(row)
    ]
    return tuple(
        Section(order, head, start, start + size)
        for (order, head, size), start in zip(sizes, source.offsets, strict=True)
    )


def rows_of(source: EngramSite | RowReader) -> RowReader:
    """The reader of a memory's rows."""
    return source.rows if isinstance(source, EngramSite) else source


def token_ids(
    model: AddressedModel, texts: Iterable[str], *, progress: bool = False
) -> Iterator[Int64[np.ndarray, " _"]]:
    """Every text with the model's start tokens, whole: a hash has no context limit. Texts without a token are left
    out.
    """
    from tqdm import tqdm

    start = start_tokens(model)
    remaining = iter(tqdm(texts, unit="text", desc="hashing texts", disable=not progress))
    while batch := list(islice(remaining, _BATCH)):
        for encoded in model.tokenizer.encode_batch(batch, add_special_tokens=False):
            if encoded.ids:
                yield np.array([*start, *encoded.ids], dtype=np.int64)


def ngram_parts(site: EngramSite, model: AddressedModel, ngram: Int64[np.ndarray, " order"]) -> list[str]:
    """The text of each compressed id; for a memory without compression the token itself."""
    vocabulary = site.vocabulary
    if vocabulary.size == vocabulary.raw_size and vocabulary.texts[:1] == ("0",):  # CompressedVocabulary.identity
        return show_tokens(model.tokenizer, [int(i) for i in ngram])
    return [vocabulary.texts[int(i)] for i in ngram]
