"""How is the inverse index of a corpus larger than memory kept?

A directory of Parquet files, `order-N/part-PPP.parquet` with columns `id0` ... (compressed ids, oldest first), `mix`,
`count`, and `index.json` with the hash it belongs to. Building cuts n-grams by key into parts while streaming the
corpus, then merges part by part, so memory holds one chunk of the corpus and one part. It appears under its name only
when complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from engram_interp.memory.hashing import NgramHash
from engram_interp.memory.ngram_counts import CHUNK_TOKENS, NgramTable, count_chunks, keys, merge

_DESCRIPTION = "index.json"


class NgramIndexError(ValueError):
    """An index that cannot be built or does not belong to this hash."""


class NgramIndex:
    """An index on disk; satisfies `NgramCounts`.

    Raises: NgramIndexError when the directory holds no index, or that of another hash.
    """

    def __init__(self, directory: Path, ngram_hash: NgramHash) -> None:
        try:
            described = json.loads((directory / _DESCRIPTION).read_text(encoding="utf-8"))
            self.tokens, self._parts, found = int(described["tokens"]), int(described["parts"]), described["hash"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise NgramIndexError(
                f"{directory}: expected an n-gram index, found none that can be read ({error})"
            ) from None
        if found != (expected := _fingerprint(ngram_hash)):
            raise NgramIndexError(
                f"{directory}: expected an index of hash {expected[:12]}, found that of another memory or tokenizer "
                f"({str(found)[:12]}); choose another directory"
            )
        self.directory = directory

    def parts(self, order: int) -> Iterator[NgramTable]:
        """See `NgramCounts.parts`.

        Raises: NgramIndexError for a part that is missing or damaged.
        """
        for part in range(self._parts):
            yield _read(_part_path(self.directory, order, part), order)


def build_index(
    directory: Path,
    ngram_hash: NgramHash,
    texts: Iterable[Int64[np.ndarray, " _"]],
    *,
    parts: int = 16,
    chunk_tokens: int = CHUNK_TOKENS,
) -> NgramIndex:
    """Count a corpus of any size into a new directory.

    Raises: NgramIndexError when the directory exists; ValueError for a corpus without a token.
    """
    if directory.exists():
        raise NgramIndexError(f"{directory}: exists already; remove it or choose another name")
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        tokens = _write_raw(work, ngram_hash, texts, parts, chunk_tokens)
        if not tokens:
            raise ValueError("expected texts with at least one token, found none")
        for order in ngram_hash.orders:
            for part in range(parts):
                path = _part_path(work, order, part)
                merged = merge([_read(path, order)])
                path.unlink()
                with _writer(path, order) as writer:
                    writer.write_table(_arrow(merged))
        description = {"tokens": tokens, "parts": parts, "hash": _fingerprint(ngram_hash)}
        (work / _DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")
        work.chmod(0o755)
        work.rename(directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return NgramIndex(directory, ngram_hash)


def _write_raw(
    work: Path, ngram_hash: NgramHash, texts: Iterable[Int64[np.ndarray, " _"]], parts: int, chunk_tokens: int
) -> int:
    total = 0
    with ExitStack() as stack:
        writers = {}
        for order in ngram_hash.orders:
            (work / f"order-{order}").mkdir()
            for part in range(parts):
                writers[order, part] = stack.enter_context(_writer(_part_path(work, order, part), order))
        for tokens, tables in count_chunks(ngram_hash, texts, chunk_tokens):
            total += tokens
            for table, primes in zip(tables, ngram_hash.primes, strict=True):
                owner = keys(table.mix, primes) % parts
                for part in range(parts):
                    writers[table.order, part].write_table(_arrow(table.choose(owner == part)))
    return total


def _part_path(directory: Path, order: int, part: int) -> Path:
    return directory / f"order-{order}" / f"part-{part:03}.parquet"


def _writer(path: Path, order: int):  # noqa: ANN202 - pyarrow is imported here only
    import pyarrow.parquet as pq

    return pq.ParquetWriter(path, _arrow(_empty(order)).schema, compression="zstd")


def _empty(order: int) -> NgramTable:
    none = np.array([], dtype=np.int64)
    return NgramTable(order, none.reshape(0, order), none, none)


def _arrow(table: NgramTable):  # noqa: ANN202 - pyarrow is imported here only
    import pyarrow as pa

    columns = {f"id{j}": table.ids[:, j] for j in range(table.order)}
    return pa.table({**columns, "mix": table.mix, "count": table.count})


def _read(path: Path, order: int) -> NgramTable:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        stored = pq.read_table(path)
        columns = {name: stored[name].to_numpy() for name in (*(f"id{j}" for j in range(order)), "mix", "count")}
    except (OSError, KeyError, pa.ArrowException) as error:
        raise NgramIndexError(
            f"{path}: expected a part of an n-gram index, found none that can be read ({error})"
        ) from None
    ids = np.stack([columns[f"id{j}"] for j in range(order)], axis=1)
    return NgramTable(order, ids, columns["mix"], columns["count"])


def _fingerprint(ngram_hash: NgramHash) -> str:
    constants = (
        ngram_hash.multipliers,
        ngram_hash.primes,
        ngram_hash.pad,
        ngram_hash.boundary,
        ngram_hash.eos,
        ngram_hash.window_rule,
    )
    digest = hashlib.sha256(json.dumps(constants).encode())
    digest.update(np.ascontiguousarray(ngram_hash.vocabulary.token_map, dtype="<i8").tobytes())
    return digest.hexdigest()
