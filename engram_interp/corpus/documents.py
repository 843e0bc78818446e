"""How does a corpus reach the model one document at a time?

Two forms: a token file (`engram_interp.training.corpus`; documents end with `<eos>`) and JSON lines with a `text`, packed or
not. Both are read from front to back in blocks, so that memory does not depend on their size; every process reads the whole
file and keeps the documents it was given. Cost: reading and unpacking once per process; only wanted texts are tokenised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from tokenizers import Tokenizer

from engram_interp.training.corpus import EOS_ID, open_token_file, read_documents, tokenizer_hash

_BLOCK = 2**20  # tokens read at once


def stream_documents(
    path: Path, tokenizer: Tokenizer, wanted: Callable[[int], bool] = lambda number: True
) -> Iterator[tuple[int, Int64[np.ndarray, " _"] | None]]:
    """Number and token ids of every document in order, without start and end tokens; None for one that is not wanted.

    Raises: CorpusError for a damaged file, or a token file of another tokenizer.
    """
    if path.name.endswith((".jsonl", ".jsonl.zst")):
        for number, document in enumerate(read_documents([path])):
            found = tokenizer.encode(document.text, add_special_tokens=False).ids if wanted(number) else None
            yield number, None if found is None else np.asarray(found, dtype=np.int64)
        return
    open_token_file(path, tokenizer_hash(tokenizer))
    for number, ids in enumerate(_split(path)):
        yield number, ids.astype(np.int64) if wanted(number) else None


def _split(path: Path) -> Iterator[np.ndarray]:
    """The documents of a token file; read, not mapped, so that pages passed do not count as memory in use."""
    rest = np.empty(0, dtype="<u2")
    with path.open("rb") as file:
        while len(block := np.fromfile(file, dtype="<u2", count=_BLOCK)):
            *whole, rest = np.split(np.concatenate([rest, block]), len(rest) + np.flatnonzero(block == EOS_ID) + 1)
            yield from (ids[:-1] for ids in whole)
    if len(rest):  # the file may end inside a document
        yield rest


def corpus_sha256(path: Path) -> str:
    """SHA-256 of the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
