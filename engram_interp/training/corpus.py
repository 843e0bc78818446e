"""How does text become the tokens a model trains on?

JSON lines (plain or zstd) are streamed one document at a time, a byte-level BPE is learnt from them, and every document
is encoded into one flat memory-mapped file of 16-bit ids. Documents end with `<eos>`; `<bos>` opens each training row,
so that position 0 means the same thing in training and in use. Cost: one pass each; memory: one batch of documents.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import UInt16
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engram_interp.gallery.files import CorpusError as CorpusError
from engram_interp.gallery.files import read_jsonl as read_jsonl

SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>")
BOS_ID, EOS_ID, PAD_ID = range(3)


@dataclass(frozen=True)
class Document:
    """One document: its text and the title that identifies it."""

    text: str
    title: str


def read_documents(paths: Iterable[Path]) -> Iterator[Document]:
    """Documents of several corpus files in order.

    Raises: CorpusError naming file and line when a record has no `text` string.
    """
    for path in paths:
        for number, record in enumerate(read_jsonl(path), start=1):
            text = record.get("text")
            if not isinstance(text, str):
                raise CorpusError(f"{path}, line {number}: expected a string under 'text', found {type(text).__name__}")
            yield Document(text, str(record.get("title", f"{path.name}:{number}")))


def is_held_out(title: str) -> bool:
    """The split rule of the corpus: 1 % of titles, by hash, are never trained on."""
    return int(hashlib.sha1(title.encode()).hexdigest(), 16) % 100 == 0


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE with `<bos>`, `<eos>`, `<pad>` as ids 0, 1, 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer=trainer)
    return tokenizer


@dataclass(frozen=True)
class TokenFileHeader:
    """What a token file holds and where it came from (stored beside it as JSON)."""

    tokens: int
    documents: int
    vocab_size: int
    tokenizer_sha256: str
    sources: tuple[str, ...]


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer's own JSON: equal hashes mean equal ids."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def write_token_file(
    path: Path,
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    held_out: bool = False,
    batch: int = 256,
    limit: int | None = None,
) -> TokenFileHeader:
    """Encode corpus files into `path` (uint16, little endian) and `path`.json; atomic.

    Args: held_out: keep only held-out titles instead of only the others; limit: stop after this many tokens (at the end
        of a batch).
    Raises: CorpusError for a bad corpus line; ValueError when the vocabulary does not fit 16 bits.
    """
    from tqdm import tqdm

    if tokenizer.get_vocab_size() > 2**16:
        raise ValueError(f"expected at most 65536 tokens for a 16-bit file, found {tokenizer.get_vocab_size()}")
    part = path.with_suffix(path.suffix + ".part")
    tokens = documents = 0
    kept = (d for d in read_documents(paths) if is_held_out(d.title) == held_out)
    with part.open("wb") as out, tqdm(unit="tok", unit_scale=True, desc=path.name) as bar:
        while (limit is None or tokens < limit) and (group := list(islice(kept, batch))):
            for encoding in tokenizer.encode_batch_fast([d.text for d in group]):
                ids = np.asarray([*encoding.ids, EOS_ID], dtype="<u2")
                out.write(ids.tobytes())
                tokens += len(ids)
                bar.update(len(ids))
            documents += len(group)
        out.flush()
        os.fsync(out.fileno())
    header = TokenFileHeader(
        tokens, documents, tokenizer.get_vocab_size(), tokenizer_hash(tokenizer), tuple(p.name for p in paths)
    )
    part.replace(path)
    _header_path(path).write_text(json.dumps(asdict(header), indent=2))
    return header


def _header_path(path: Path) -> Path:
    return path.with_suffix(path.suffix + ".json")


def open_token_file(
    path: Path, tokenizer_sha256: str | None = None
) -> tuple[UInt16[np.ndarray, " n"], TokenFileHeader]:
    """Memory-map a token file and check it against its header.

    Raises: CorpusError when the file is missing, its size disagrees with the header, or it was made by another
        tokenizer.
    """
    try:
        fields = json.loads(_header_path(path).read_text(encoding="utf-8"))
        header = TokenFileHeader(**fields | {"sources": tuple(fields["sources"])})
        size = path.stat().st_size
    except FileNotFoundError:
        raise CorpusError(f"{path}: no token file here (make one with `engram-interp tokenize`)") from None
    except (ValueError, TypeError, KeyError) as error:
        raise CorpusError(f"{_header_path(path)}: not the header of a token file ({error})") from None
    if size != 2 * header.tokens:
        raise CorpusError(f"{path}: header says {header.tokens} tokens, the file holds {size / 2:g}")
    if tokenizer_sha256 is not None and header.tokenizer_sha256 != tokenizer_sha256:
        raise CorpusError(
            f"{path}: made by another tokenizer, expected {tokenizer_sha256[:12]}, found {header.tokenizer_sha256[:12]}"
        )
    return np.memmap(path, dtype="<u2", mode="r"), header
