"""`engram-interp memory ...`: open a model or a bare table, ask one question, print the answer.

PATH is a bundled name, a model directory, a GGUF file, or a table file (`.safetensors`, an index; any of them if
`tensor` is given). Questions that need a hash or an unembedding need a model; `rows`, `neighbours` and `diff` take
either.
"""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol, runtime_checkable

from tyro.conf import Positional, arg

from engram_interp.gallery.files import read_texts
from engram_interp.memory.gguf_rows import open_rows
from engram_interp.memory.ngram_index import NgramIndex, build_index
from engram_interp.memory.row_reader import RowReader
from engram_interp.models.adapters.opening import open_model
from engram_interp.models.site import EngramSite
from engram_interp.probes.collisions import slot_collisions
from engram_interp.probes.memory_rows import access_report, diff_tables, row_statistics
from engram_interp.probes.memory_site import AddressedModel, hash_of, site_of, token_ids
from engram_interp.probes.memory_table import lookup, neighbours, read_slot
from engram_interp.runs.result_files import finite, write_form

ModelPath = Positional[Annotated[str, arg(help="a bundled name, a model directory or a GGUF file")]]
SourcePath = Positional[Annotated[str, arg(help="a bundled name, a model directory, a GGUF or a table file")]]
Row = Positional[Annotated[int, arg(help="row of the flat table, as lookup prints it")]]
Texts = Annotated[Path, arg(help="corpus: .jsonl or .jsonl.zst with a `text` per line, else one text per line")]
Block = Annotated[int | None, arg(help="which memory, by 0-based block; default the first")]
Index = Annotated[Path | None, arg(help="directory of the corpus's n-grams on disk; built from --texts if absent")]
Tensor = Annotated[str | None, arg(help="read this tensor of the files instead of opening a model")]
Base = Annotated[str | None, arg(help="the base model of an adapter")]
Json = Annotated[bool, arg(help="print everything as JSON")]
Out = Annotated[Path | None, arg(help="write .json, .csv or .html (the figure) here")]

_TABLE_SUFFIXES = (".safetensors", ".json")


if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@runtime_checkable
class _Result(Protocol):
    def table(self) -> pd.DataFrame: ...
    def figure(self) -> go.Figure: ...
    def as_dict(self) -> dict[str, object]: ...


def run_lookup(
    path: ModelPath,
    text: Positional[str],
    *,
    block: Block = None,
    base: Base = None,
    json: Json = False,
    out: Out = None,
) -> int:
    """`memory lookup PATH TEXT`: compressed n-grams, slots per order and head, row norms."""
    return _say(lookup(_open(path, base=base), text, block=block), json, out)


def run_collisions(
    path: ModelPath,
    texts: Texts,
    *,
    block: Block = None,
    index: Index = None,
    inspect: int = 8,
    base: Base = None,
    json: Json = False,
    out: Out = None,
) -> int:
    """`memory collisions PATH --texts FILE`. `index`: keep n-grams in this directory (built if absent) instead of
    memory.
    """
    model = _open(path, base=base)
    counts = _index(model, index, texts, block)
    shown = list(_first(read_texts(texts), inspect)) if counts else list(read_texts(texts))
    return _say(
        slot_collisions(model, shown, block=block, index=counts, inspect=inspect, progress=_progress()), json, out
    )


def run_access(
    path: ModelPath,
    texts: Texts,
    *,
    block: Block = None,
    index: Index = None,
    hit_rates: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.99),
    base: Base = None,
    json: Json = False,
    out: Out = None,
) -> int:
    """`memory access PATH --texts FILE`: hot rows, Zipf curve, cache size for a hit rate."""
    model = _open(path, base=base)
    counts = _index(model, index, texts, block)
    corpus = [] if counts else list(read_texts(texts))
    report = access_report(model, corpus, block=block, index=counts, hit_rates=hit_rates, progress=_progress())
    return _say(report, json, out)


def run_rows(
    path: SourcePath,
    *,
    block: Block = None,
    tensor: Tensor = None,
    stats: bool = True,
    sample: int | None = None,
    seed: int = 0,
    base: Base = None,
    json: Json = False,
    out: Out = None,
) -> int:
    """`memory rows PATH`: norms per head, zero and non-finite rows. `sample`: rows per head; default all. `no-stats`:
    only the heads and their sizes.
    """
    source = open_source(path, block, tensor, base)
    return _say(row_statistics(source, sample=sample if stats else 0, seed=seed, progress=_progress()), json, out)


def run_neighbours(
    path: SourcePath,
    row: Row,
    *,
    block: Block = None,
    tensor: Tensor = None,
    top: int = 10,
    base: Base = None,
    json: Json = False,
    out: Out = None,
) -> int:
    """`memory neighbours PATH ROW`: the rows of the same head nearest by cosine."""
    return _say(neighbours(open_source(path, block, tensor, base), row, top=top, progress=_progress()), json, out)


def run_read(
    path: ModelPath,
    row: Row,
    *,
    block: Block = None,
    vocab: bool = True,
    top: int = 10,
    texts: Annotated[Path | None, arg(help="corpus to build --index from")] = None,
    index: Index = None,
    base: Base = None,
    json: Json = False,
    out: Out = None,
) -> int:
    """`memory read PATH ROW`: tokens a row promotes; with `index`, the corpus n-grams that read it. `no-vocab`: the
    latter alone.
    """
    model = _open(path, base=base)
    counts = _index(model, index, texts, block)
    reading = read_slot(model, row, block=block, top=top, vocab=vocab, index=counts)
    _say(reading, json, out)
    if not json and out is None and counts is not None:
        found = "".join(f"\n  {count:>7} {ngram}" for ngram, count in reading.ngrams)
        sys.stdout.write(f"read by these n-grams of the corpus:{found or ' none'}\n")
    return 0


def run_diff(
    a: SourcePath,
    b: SourcePath,
    *,
    block: Block = None,
    tensor: Tensor = None,
    base: Base = None,
    json: Json = False,
    out: Out = None,
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
    return site_of(_open(path, base=base), block)


def _open(path: str, *, base: str | None) -> AddressedModel:
    return open_model(path, base=base)  # type: ignore[return-value] - every kind that is opened has a tokenizer


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
        sys.stdout.write(json_module.dumps(finite(result.as_dict()), allow_nan=False) + "\n")
    elif out is None:
        table = result.table()
        plain = ((name, value) for name, value in result.as_dict().items() if isinstance(value, int | str))
        text = table.to_string(index=False) if len(table) else ", ".join(f"{name} {value}" for name, value in plain)
        sys.stdout.write(text + "\n")
    return 0


def _write(result: _Result, out: Path) -> None:
    forms = {
        ".json": lambda: json_module.dumps(finite(result.as_dict()), allow_nan=False),
        ".csv": lambda: result.table().to_csv(index=False),
        ".html": lambda: result.figure().to_html(include_plotlyjs=True),
    }
    write_form(out, forms)
