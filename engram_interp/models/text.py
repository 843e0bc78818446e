"""How is a text cut into what a model can read at once, and how is a token shown?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from tokenizers import Tokenizer

from engram_interp.models.protocol import Decoder, TokenisedModel
from engram_interp.shapes import Int64, Tensor

MAX_TOKENS = 8192


@dataclass(frozen=True)
class Window:
    """One forward's worth of a text: `tokens` [1, T], of which positions `keep` are new and `keep.start` on are read."""

    tokens: Int64[Tensor, "1 T"]
    keep: slice


def windows(model: Decoder, text: str, *, limit: int = MAX_TOKENS) -> Iterator[Window]:
    """Cut a text into windows of the model's context.

    Each later window repeats up to 64 tokens of the one before it as context, whose positions are not read again; it starts
    with the model's start token like any text. The first window's start token is read.
    Raises: ValueError for an empty text or one of more than `limit` tokens.
    """
    ids = model.tokenizer.encode(text, add_special_tokens=False).ids
    if not ids:
        raise ValueError("expected a text with at least one token, found an empty text")
    if len(ids) > limit:
        raise ValueError(f"expected at most {limit} tokens, found {len(ids)}")
    yield from windows_of_ids(ids, start_tokens(model), model.context)


def windows_of_ids(ids: Sequence[int], start: Sequence[int], context: int) -> Iterator[Window]:
    """As `windows`, for ids without the start token; none for no ids."""
    size = context - len(start)
    overlap = min(64, size // 4)
    begin = 0
    while ids and (begin == 0 or begin + overlap < len(ids)):
        tokens = torch.tensor([[*start, *ids[begin : begin + size]]])
        yield Window(tokens, slice(len(start) + overlap if begin else 0, tokens.shape[1]))
        begin += size - overlap


def start_tokens(model: TokenisedModel) -> list[int]:
    """The ids the model puts before every text (`<bos>`, or nothing)."""
    probe = model.to_tokens("a")[0].tolist()
    return probe[: len(probe) - len(model.tokenizer.encode("a", add_special_tokens=False).ids)]


def show_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token by itself; a fragment of a multi-byte character as its bytes in hexadecimal, `<e4b8>`."""
    return [_show(tokenizer, int(token)) for token in ids]


def _show(tokenizer: Tokenizer, token: int) -> str:
    text = tokenizer.decode([token], skip_special_tokens=False)
    if "\ufffd" not in text:
        return text
    raw = tokenizer.id_to_token(token) or ""
    alphabet = _byte_alphabet()
    if raw and all(c in alphabet for c in raw):
        return f"<{bytes(alphabet[c] for c in raw).hex()}>"
    return raw


@lru_cache
def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE uses for the 256 bytes (GPT-2's table, rebuilt from its rule)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
