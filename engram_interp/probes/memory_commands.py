"""`engram-interp memory ...`: open a model or a bare table, ask one question, print the answer.

PATH is a bundled name, a model directory, or a table file (`.safetensors`, `.gguf`, an index; any directory if `tensor`
is given). Questions that need a hash or an unembedding need a model; `rows`, `neighbours` and `diff` take either.
"""

from __future__ import annotations

import io
import json as json_module
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

from engram_interp.memory.gguf_rows import open_rows
from engram_interp.memory.ngram_index import NgramIndex, build_index
from engram_interp.memory.row_reader import RowReader
from engram_interp.models.adapters.opening import open_model
from engram_interp.models.site import EngramSite
from engram_interp.probes.collisions import slot_collisions
from engram_interp.probes.memory_rows import access_report, diff_tables, row_statistics
from engram_interp.probes.memory_site import AddressedModel, hash_of, site_of, token_ids
from engram_interp.probes.memory_table import lookup, neighbours, read_slot

_TABLE_SUFFIXES = (".safetensors", ".gguf", ".json")


@runtime_checkable
class _Result(Protocol):
    def table(self): ...  # noqa: ANN202
    def as_dict(self) -> dict[str, object]: ...


def run_lookup(
    path: str,
    text: str,
    *,
    block: int | None = None,
    base: str | None = None,
    json: bool = False,
    out: Path | None = None,
) -> int:
    """`memory lookup PATH TEXT`: compressed n-grams, slots per order and head, row norms."""
    return _say(lookup(open_model(path, base=base), text, block=block), json, out)


def run_collisions(
    path: str,
    texts: Path,
    *,
    block: int | None = None,
    index: Path | None = None,
    inspect: int = 8,
    base: str | None = None,
    json: bool = False,
    out: Path | None = None,
) -> int:
    """`memory collisions PATH --texts FILE`. `index`: keep n-grams in this directory (built if absent) instead of
    memory.
    """
    model = open_model(path, base=base)
    counts = _index(model, index, texts, block)
    shown = list(_first(read_texts(texts), inspect)) if counts else list(read_texts(texts))
    return _say(
        slot_collisions(model, shown, block=block, index=counts, inspect=inspect, progress=_progress()), json, out
    )


def run_access(
    path: str,
    texts: Path,
    *,
    block: int | None = None,
    index: Path | None = None,
    hit_rates: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.99),
    base: str | None = None,
    json: bool = False,
    out: Path | None = None,
) -> int:
    """`memory access PATH --texts FILE`: hot rows, Zipf curve, cache size for a hit rate."""
    model = open_model(path, base=base)
    counts = _index(model, index, texts, block)
    corpus = [] if counts else list(read_texts(texts))
    report = access_report(model, corpus, block=block, index=counts, hit_rates=hit_rates, progress=_progress())
    return _say(report, json, out)


def run_rows(
    path: str,
    *,
    block: int | None = None,
    tensor: str | None = None,
    sample: int | None = None,
    seed: int = 0,
    base: str | None = None,
    json: bool = False,
    out: Path | None = None,
) -> int:
    """`memory rows PATH`: norms per head, zero and non-finite rows. `sample`: rows per head; default all."""
    source = open_source(path, block, tensor, base)
    return _say(row_statistics(source, sample=sample, seed=seed, progress=_progress()), json, out)


def run_neighbours(
    path: str,
    row: int,
    *,
    block: int | None = None,
    tensor: str | None = None,
    top: int = 10,
    base: str | None = None,
    json: bool = False,
    out: Path | None = None,
) -> int:
    """`memory neighbours PATH ROW`: the rows of the same head nearest by cosine."""
    return _say(neighbours(open_source(path, block, tensor, base), row, top=top, progress=_progress()), json, out)


def run_read(
    path: str,
    row: int,
    *,
    block: int | None = None,
    top: int = 10,
    texts: Path | None = None,
    index: Path | None = None,
    base: str | None = None,
    json: bool = False,
    out: Path | None = None,
) -> int:
    """`memory read PATH ROW`: tokens a row promotes; with `index`, the corpus n-grams that read it."""
    model = open_model(path, base=base)
    return _say(read_slot(model, row, block=block, top=top, index=_index(model, index, texts, block)), json, out)


def run_diff(
    a: str,
    b: str,
    *,
    block: int | None = None,
    tensor: str | None = None,
    base: str | None = None,
    json: bool = False,
    out: Path | None = None,
) -> int:
    """`memory diff A B`: the rows that differ."""
    left, right = open_source(a, block, tensor, base), open_source(b, block, tensor, base)
    return _say(diff_tables(left, right, progress=_progress()), json, out)


def open_source(path: str, block: int | None, tensor: str | None, base: str | None) -> EngramSite | RowReader:
    """A memory of a model, or the rows of a bare table file.

    Raises: ValueError for anything that cannot be opened.
    """
    if tensor is not None or Path(path).suffix in _TABLE_SUFFIXES:
        return open_rows(Path(path), tensor)
    return site_of(open_model(path, base=base), block)


def read_texts(path: Path) -> Iterator[str]:
    """Texts of a file: the `text` of every line of `.jsonl` or `.jsonl.zst`, else every line that is not blank.

    Raises: ValueError naming the first line that holds no text.
    """
    with _open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if ".jsonl" not in path.name:
                if line.strip():
                    yield line.rstrip("\n")
                continue
            try:
                yield str(json_module.loads(line)["text"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}: line {number}: expected a JSON object with a 'text'") from None


@contextmanager
def _open_text(path: Path) -> Iterator[io.TextIOBase]:
    if path.suffix != ".zst":
        with path.open(encoding="utf-8") as file:
            yield file
        return
    import zstandard

    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        yield io.TextIOWrapper(stream, encoding="utf-8")


def _first(texts: Iterator[str], count: int) -> Iterator[str]:
    for _, text in zip(range(count), texts, strict=False):
        yield text


def _index(model: AddressedModel, directory: Path | None, texts: Path | None, block: int | None) -> NgramIndex | None:
    if directory is None:
        return None
    ngram_hash = hash_of(site_of(model, block))
    if directory.exists():
        return NgramIndex(directory, ngram_hash)
    if texts is None:
        raise ValueError(f"{directory}: no such index; give --texts to build it")
    return build_index(directory, ngram_hash, token_ids(model, read_texts(texts), progress=_progress()))


def _progress() -> bool:
    return sys.stderr.isatty()


def _say(result: _Result, json: bool, out: Path | None) -> int:
    """JSON or a table on standard output; `out` receives .json, .csv or .html (the figure)."""
    if out is not None:
        _write(result, out)
    if json:
        sys.stdout.write(json_module.dumps(_finite(result.as_dict()), allow_nan=False) + "\n")
    elif out is None:
        sys.stdout.write(result.table().to_string(index=False) + "\n")
    return 0


def _write(result, out: Path) -> None:  # noqa: ANN001
    from engram_interp.models.checkpoint import write_atomically

    forms = {
        ".json": lambda: json_module.dumps(_finite(result.as_dict()), allow_nan=False),
        ".csv": lambda: result.table().to_csv(index=False),
        ".html": lambda: result.figure().to_html(include_plotlyjs=True),
    }
    if out.suffix not in forms:
        raise ValueError(f"expected a file ending in {', '.join(forms)}, found {out.name!r}")
    content = forms[out.suffix]()
    write_atomically(out, lambda part: part.write_text(content, encoding="utf-8") and None)


def _finite(value: object) -> object:
    """JSON has no nan or infinity: they become null."""
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value
