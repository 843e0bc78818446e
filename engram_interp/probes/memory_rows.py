"""What state are a table's rows in, which are used, and which did somebody change?

`row_statistics`: norms per head, zero and non-finite rows. `access_report`: reads per row over a corpus, Zipf curve,
and how many of the hottest rows serve a given share of reads. `diff_tables`: rows that differ between two tables. Cost:
rows are streamed, one head's norms at a time (a sample of a huge table is an option); access needs one pass over the
corpus n-grams per head. Misleads: a row's norm is not its effect, which passes W_V and the gate; a cold row in this
corpus may be hot in another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, Int64

from engram_interp.memory.access import HIT_RATES, ZipfCurve, rows_for_hit_rates, slot_loads, zipf_curve
from engram_interp.memory.ngram_counts import NgramCounts, count_ngrams
from engram_interp.memory.overlay_diff import TableDiff, diff_rows
from engram_interp.memory.row_reader import RowReader, chunk_rows, chunks
from engram_interp.models.site import EngramSite
from engram_interp.probes.memory_site import AddressedModel, Section, hash_of, rows_of, sections_of, site_of, token_ids
from engram_interp.runs import Provenance, texts_hash

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
_HOTTEST = 20


@dataclass(frozen=True)
class HeadRows:
    """Norms of the rows of one head; `read` rows were looked at. Non-finite rows are left out of mean, deviation,
    quantiles.
    """

    order: int
    head: int
    rows: int
    read: int
    zero: int
    not_finite: int
    mean: float
    deviation: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class RowStatistics:
    """The rows of a table by head; `quantiles` of each head belong to `QUANTILES`."""

    table_name: str
    width: int
    heads: tuple[HeadRows, ...]
    provenance: Provenance

    def table(self) -> pd.DataFrame:
        """One row per head."""
        import pandas as pd

        names = [f"q{quantile:g}" for quantile in QUANTILES]
        rows = []
        for head in self.heads:
            plain = {name: value for name, value in asdict(head).items() if name != "quantiles"}
            rows.append(plain | dict(zip(names, head.quantiles, strict=True)))
        return pd.DataFrame(rows)

    def figure(self) -> go.Figure:
        """Quantiles of the norms per head."""
        from engram_interp.figures.memory import norm_figure

        return norm_figure(self.table(), title=self.table_name)

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {**asdict(self), "quantiles": list(QUANTILES), "provenance": self.provenance.as_dict()}


def row_statistics(
    source: EngramSite | RowReader, *, sample: int | None = None, seed: int = 0, progress: bool = False
) -> RowStatistics:
    """Norms of a table's rows, per head.

    Args: source: a memory (`site_of(model, block)`) or a reader; sample: rows per head, drawn with `seed`; None reads
    all.
    """
    from tqdm import tqdm

    reader, generator = rows_of(source), np.random.default_rng(seed)
    sections = tqdm(sections_of(source), desc="heads", disable=not progress)
    heads = tuple(_head_rows(section, _norms(reader, section, sample, generator)) for section in sections)
    provenance = Provenance({reader.name: ""}, texts_hash([]), 0, {"sample": sample, "seed": seed})
    return RowStatistics(reader.name, reader.width, heads, provenance)


def _norms(
    reader: RowReader, section: Section, sample: int | None, generator: np.random.Generator
) -> Float32[np.ndarray, " n"]:
    size = section.stop - section.start
    with np.errstate(over="ignore", invalid="ignore"):
        if sample is None or sample >= size:
            parts = [np.linalg.norm(rows, axis=1) for _, rows in chunks(reader, section.start, section.stop)]
        else:
            chosen = section.start + np.sort(generator.choice(size, sample, replace=False))
            step = chunk_rows(reader)
            parts = [np.linalg.norm(reader.read(chosen[i : i + step]), axis=1) for i in range(0, sample, step)]
    return np.concatenate([*parts, np.array([], dtype=np.float32)])


def _head_rows(section: Section, norms: Float32[np.ndarray, " n"]) -> HeadRows:
    finite = norms[np.isfinite(norms)].astype(np.float64)
    empty = not len(finite)
    return HeadRows(
        order=section.order,
        head=section.head,
        rows=section.stop - section.start,
        read=len(norms),
        zero=int((norms == 0).sum()),
        not_finite=len(norms) - len(finite),
        mean=float("nan") if empty else float(finite.mean()),
        deviation=float("nan") if empty else float(finite.std()),
        quantiles=(float("nan"),) * len(QUANTILES) if empty else tuple(np.quantile(finite, QUANTILES).tolist()),
    )


@dataclass(frozen=True, eq=False)
class DiffResult:
    """Rows that differ between two tables, with the head each belongs to (order 0: heads not known)."""

    a: str
    b: str
    diff: TableDiff
    order: Int64[np.ndarray, " changed"]
    head: Int64[np.ndarray, " changed"]
    provenance: Provenance

    def table(self) -> pd.DataFrame:
        """One row per changed row."""
        import pandas as pd

        d = self.diff
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = d.change / d.before
        columns = {"row": d.rows, "order": self.order, "head": self.head, "change": d.change}
        return pd.DataFrame({**columns, "relative": relative, "cosine": d.cosine})

    def figure(self) -> go.Figure:
        """Relative change of every changed row, by row number."""
        from engram_interp.figures.memory import diff_figure

        return diff_figure(self.table(), title=f"{self.a} against {self.b}")

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON; values that are not finite become null."""
        table = self.table()
        values = {
            name: [None if v != v or abs(v) == float("inf") else v for v in table[name].tolist()] for name in table
        }
        summary = {"a": self.a, "b": self.b, "compared": self.diff.compared, "changed": len(table)}
        return summary | {"rows": values, "provenance": self.provenance.as_dict()}


def diff_tables(a: EngramSite | RowReader, b: EngramSite | RowReader, *, progress: bool = False) -> DiffResult:
    """The rows that differ between two memories or tables of one shape; heads are those of `a`.

    Raises: TableError when the shapes differ.
    """
    reader_a, reader_b = rows_of(a), rows_of(b)
    diff = diff_rows(reader_a, reader_b, progress=progress)
    sections = sections_of(a)
    owner = np.searchsorted([section.start for section in sections], diff.rows, side="right") - 1
    orders, heads = (
        np.array([getattr(s, name) for s in sections], dtype=np.int64)[owner] for name in ("order", "head")
    )
    provenance = Provenance({reader_a.name: "", reader_b.name: ""}, texts_hash([]), 0, {})
    return DiffResult(reader_a.name, reader_b.name, diff, orders, heads, provenance)


@dataclass(frozen=True, eq=False)
class AccessReport:
    """Reads of one memory over a corpus: every token reads S rows.

    `rows_for_rate` hottest rows serve `hit_rates` of all reads; `hottest` are (row, order, head, reads).
    """

    model: str
    block: int
    tokens: int
    rows: int
    rows_read: int
    reads: int
    hit_rates: tuple[float, ...]
    rows_for_rate: tuple[int, ...]
    zipf: ZipfCurve
    hottest: tuple[tuple[int, int, int, int], ...]
    provenance: Provenance

    def table(self) -> pd.DataFrame:
        """One row per hit rate: rows to keep, and their share of the table."""
        import pandas as pd

        kept = np.array(self.rows_for_rate)
        return pd.DataFrame({"hit_rate": self.hit_rates, "rows": kept, "share_of_table": kept / self.rows})

    def figure(self) -> go.Figure:
        """Zipf curve: reads against rank, with the fitted exponent."""
        from engram_interp.figures.memory import zipf_figure

        return zipf_figure(
            self.zipf.rank, self.zipf.reads, self.zipf.exponent, title=f"{self.model}, block {self.block}"
        )

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        zipf = {"rank": self.zipf.rank.tolist(), "reads": self.zipf.reads.tolist(), "exponent": self.zipf.exponent}
        names = ("model", "block", "tokens", "rows", "rows_read", "reads", "hit_rates", "rows_for_rate", "hottest")
        return {name: getattr(self, name) for name in names} | {"zipf": zipf, "provenance": self.provenance.as_dict()}


def access_report(
    model: AddressedModel,
    texts: Sequence[str],
    *,
    block: int | None = None,
    index: NgramCounts | None = None,
    hit_rates: Sequence[float] = HIT_RATES,
    progress: bool = False,
) -> AccessReport:
    """How a corpus uses the rows of one memory.

    Args: index: an `NgramIndex` of a corpus, used instead of counting `texts`; hit_rates: in (0, 1].
    Raises: ValueError for a model without memory, a corpus without a token, or a rate outside (0, 1].
    """
    from tqdm import tqdm

    site = site_of(model, block)
    ngram_hash = hash_of(site)
    counts = index or count_ngrams(ngram_hash, token_ids(model, texts, progress=progress))
    rows, reads = [], []
    for section in tqdm(sections_of(site), desc="heads", disable=not progress):
        load = slot_loads(counts, ngram_hash, section.order, section.head, occurrences=True)
        used = np.flatnonzero(load)  # only rows that were read are kept: a table is far larger than a corpus
        rows.append(section.start + used)
        reads.append(load[used])
    row, read = np.concatenate(rows), np.concatenate(reads)
    hottest = np.argsort(-read, kind="stable")[:_HOTTEST]
    owner = [next(s for s in sections_of(site) if s.start <= r < s.stop) for r in row[hottest]]
    options = {"block": site.block, "index": index is not None, "hit_rates": list(hit_rates)}
    return AccessReport(
        model=model.identity.name,
        block=site.block,
        tokens=counts.tokens,
        rows=ngram_hash.rows,
        rows_read=len(row),
        reads=int(read.sum()),
        hit_rates=tuple(hit_rates),
        rows_for_rate=tuple(rows_for_hit_rates(read, hit_rates).tolist()),
        zipf=zipf_curve(read),
        hottest=tuple((int(row[i]), s.order, s.head, int(read[i])) for i, s in zip(hottest, owner, strict=True)),
        provenance=Provenance(
            {model.identity.name: model.identity.weights_sha256}, texts_hash(texts), len(texts), options
        ),
    )
