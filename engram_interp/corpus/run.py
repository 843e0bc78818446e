"""What do the gates and the lens say over a corpus: one process or many, restartable, in bounded memory?

The documents are cut into shards of a fixed number, whatever the number of processes; shard k is read by process k mod N, put
into the run folder, and not read again by a later start of the same command. Sums are added in the order of the shards, so that
every table is the same to the last bit for any N and any history of stops.

    RUN/tables/summary     per quantity: mean with a 95 % interval over documents, spread, quantiles
    RUN/tables/histogram   per quantity: how many tokens in each bin
    RUN/tables/documents   per document: mean of every quantity
    RUN/shards/tokens/*    per token, on request; one Parquet file per shard, which pandas and duckdb open as one table

Memory: one shard (8 documents) and the model; the documents table, 8 bytes per document and quantity, is joined once at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from engram_interp.corpus.documents import corpus_sha256, stream_documents
from engram_interp.corpus.processes import Processes, StoppedError
from engram_interp.corpus.reading import CorpusReader, Numbered, Probe
from engram_interp.corpus.sums import Sums
from engram_interp.measure.statistics import group_mean_interval
from engram_interp.models.protocol import Decoder
from engram_interp.runs.folder import RunFolder, start_run
from engram_interp.runs.manifest import read_manifest

if TYPE_CHECKING:
    import pandas as pd

_BLOCK = 256  # shards whose sums are exchanged at once


@dataclass(frozen=True)
class CorpusOptions:
    """`documents`: read only that many from the front (0: all). `per_token`: keep a row per token. `batch`: windows per forward.

    `threads` per process; the bits of a matrix product depend on it, so it belongs to the run.
    """

    probes: tuple[Probe, ...] = ("gates", "lens")
    documents: int = 0
    per_token: bool = False
    shard_documents: int = 8
    batch: int = 8
    threads: int = 1

    def __post_init__(self) -> None:
        for name, least in (("documents", 0), ("shard_documents", 1), ("batch", 1), ("threads", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} of at least {least}, found {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class CorpusResult:
    """What one process knows at the end; `summary` is empty in all but the first. `read` of `shards` were read now, by this one."""

    run: Path
    shards: int
    read: int
    summary: pd.DataFrame


def read_corpus_run(
    model: Decoder, corpus: Path, out: Path, options: CorpusOptions, processes: Processes | None = None
) -> CorpusResult:
    """Read a corpus into a run folder, or go on with one that was stopped.

    Args: corpus: a token file, or JSON lines; processes: from `joined_processes`, None for this one alone.
    Raises: RunError when the folder holds a run of another configuration, model or corpus; CorpusError for a damaged corpus or
        one without documents; StoppedError, naming what is finished, when another process is gone.
    """
    team = processes or Processes()
    reader = CorpusReader(model, options.probes, options.batch, team.device)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        with _start(model, corpus, out, options) if team.rank == 0 else nullcontext() as first:
            team.wait()
            run = first or RunFolder(out, read_manifest(out))
            return _read(reader, corpus, run, options, team)
    except StoppedError as error:
        done = len(RunFolder(out, read_manifest(out)).done_shards("sums")) if (out / "shards").is_dir() else 0
        raise StoppedError(
            f"rank {team.rank} of {team.size}: {error}; {done} shards are finished in {out}, and the same command goes on "
            "with them"
        ) from None
    finally:
        torch.set_num_threads(before)


def _start(model: Decoder, corpus: Path, out: Path, options: CorpusOptions) -> AbstractContextManager[RunFolder]:
    return start_run(
        out,
        study="corpus",
        config={"corpus": corpus.name, **asdict(options), "probes": list(options.probes)},
        seeds=[],
        models={model.identity.name: model.identity.weights_sha256},
        texts_sha256=corpus_sha256(corpus),
    )


def _read(reader: CorpusReader, corpus: Path, run: RunFolder, options: CorpusOptions, team: Processes) -> CorpusResult:
    import pandas as pd

    done, size = set(run.done_shards("sums")), options.shard_documents

    def mine(number: int) -> bool:
        shard = number // size
        return shard % team.size == team.rank and _name(shard) not in done

    documents = stream_documents(corpus, reader.model.tokenizer, mine)
    shards = read = 0
    for shard, members in groupby(islice(documents, options.documents or None), key=lambda item: item[0] // size):
        shards += 1
        if wanted := [(number, ids) for number, ids in members if ids is not None]:
            _read_shard(reader, run, _name(shard), wanted, options.per_token)
            read += 1
    if not shards:
        raise ValueError(f"{corpus}: expected at least one document, found none")
    totals = _merged(run, shards, team)
    summary = _tables(run, shards, totals) if team.rank == 0 else pd.DataFrame()
    team.wait()  # nobody leaves while the tables are being written: torchrun would take it for the end
    return CorpusResult(run.path, shards, read, summary)


def _name(shard: int) -> str:
    return f"{shard:08d}"


def _read_shard(reader: CorpusReader, run: RunFolder, name: str, documents: list[Numbered], per_token: bool) -> None:
    readings = reader.read(documents)
    if per_token:
        run.write_shard("tokens", name, readings.by_token())
    run.write_shard("documents", name, readings.by_document())
    run.write_shard("sums", name, readings.sums().frame())  # last: what has it is finished


def _merged(run: RunFolder, shards: int, team: Processes) -> Sums:
    """All shards' sums added in order; the processes exchange a block at a time, each giving the rows of its own shards."""
    first = Sums.of_frame(run.read_shard("sums", _name(0))) if team.rank == 0 else None
    columns = torch.tensor([[0.0 if first is None else first.values.size]], dtype=torch.float64)
    total = np.zeros(int(team.sum_rows(columns)))
    for start in range(0, shards, _BLOCK):
        block = range(start, min(start + _BLOCK, shards))
        rows = torch.zeros(len(block), len(total), dtype=torch.float64)
        for row, shard in enumerate(block):
            if shard % team.size == team.rank:
                rows[row] = torch.from_numpy(Sums.of_frame(run.read_shard("sums", _name(shard))).values.ravel())
        for row in team.sum_rows(rows).numpy():
            total += row
    return Sums((), np.empty((0, 0))) if first is None else Sums(first.quantities, total.reshape(first.values.shape))


def _tables(run: RunFolder, shards: int, totals: Sums) -> pd.DataFrame:
    documents = run.gather("documents", [_name(shard) for shard in range(shards)])
    summary = totals.summary()
    summary[["low", "high", "documents"]] = list(_intervals(totals, documents))
    run.write_table("summary", summary)
    run.write_table("histogram", totals.histogram())
    return summary


def _intervals(totals: Sums, documents: pd.DataFrame) -> Iterator[tuple[float, float, int]]:
    """95 % intervals of the means over tokens, documents being the unit; NaN with fewer than two."""
    for quantity in totals.quantities:
        means = documents[quantity.column].to_numpy()
        # The last token of a document has no next one to be compared with.
        sizes = documents["tokens"].to_numpy() - (1 if quantity.kind == "cross_entropy" else 0)
        present = np.isfinite(means)
        if present.sum() < 2:
            yield float("nan"), float("nan"), int(present.sum())
            continue
        found = group_mean_interval(means[present], sizes[present].astype(np.float64))
        yield found.low, found.high, found.n
