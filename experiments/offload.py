"""What does it cost to keep the table out of memory, and what does reading one step ahead give back?

The same forwards with the table in memory, in a mapped file, and in a mapped file whose rows are read one step ahead by a background
thread, the file's pages dropped from the system's cache before every pass ("cold") or left there ("warm"), interleaved in one
process; and how often a cache of some size would have the rows under Zipf traffic. The paper loses 1.9 and 2.8 % of its throughput
with a table of 100 billion parameters in host memory (table 4). Ratios describe this machine's disk and cores.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field

from engram_interp.figures.bars import Bars, bars_figure
from engram_interp.memory.mapped_rows import MappedRows
from engram_interp.memory.offload import offloaded
from engram_interp.models.house import HouseModel, initialise
from engram_interp.studies import Context, Plan, Report, Shard, Study, StudyConfig, main

if TYPE_CHECKING:
    import pandas as pd

TABLES = ("passes", "cache", "ratios")
CONDITIONS = ("memory", "mapped cold", "ahead cold", "mapped warm", "ahead warm")
PAPER = {"4B-Dense, table in host memory": 0.981, "8B-Dense, table in host memory": 0.972}


class Config(StudyConfig):
    """`rows` of every head; `steps` forwards of `batch` full contexts a pass, `rounds` passes of each condition; `exponent` of the
    Zipf law of token frequencies; `cache_fractions` of the table that a cache may hold.
    """

    rows: int = Field(ge=2)
    batch: int = Field(ge=1)
    steps: int = Field(ge=2)
    rounds: int = Field(ge=2)
    exponent: float = Field(1.0, gt=0)
    cache_fractions: tuple[float, ...] = Field(min_length=1)


class FileRows:
    """A table of float32 in a file of its own, read by mapping."""

    def __init__(self, path: Path, weight: torch.Tensor) -> None:
        self.rows, self.width = weight.shape
        self.name = path.name
        weight.numpy().tofile(path)
        self._path = path
        self._mapped = MappedRows(path, 0, self.rows, 4 * self.width, self.name)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """See `RowReader.read`."""
        return self._mapped.read(indices).view(np.float32)

    def forget(self) -> None:
        """Ask the system to drop the file's pages from its cache."""
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def enlarged(context: Context, seed: int) -> HouseModel:
    """The model's architecture with a table of `rows`, random weights: speed does not depend on them."""
    model, config = context.model, context.config
    assert isinstance(model, HouseModel)
    assert isinstance(config, Config)
    assert model.cfg.engram is not None
    memory = model.cfg.engram.model_copy(update={"rows_per_head": (config.rows,) * len(model.cfg.engram.rows_per_head)})
    large = HouseModel(model.cfg.model_copy(update={"engram": memory}), model.vocabulary, model.tokenizer)
    return initialise(large, torch.Generator().manual_seed(seed)).eval().requires_grad_(False)


def traffic(model: HouseModel, config: Config, seed: int) -> list[torch.Tensor]:
    """Batches of tokens whose frequencies follow a Zipf law."""
    rng = np.random.default_rng((seed, 1))
    ids = rng.permutation(np.arange(3, model.vocab_size))
    weight = np.arange(1, len(ids) + 1, dtype=np.float64) ** -config.exponent
    shape = (config.steps, config.batch, model.context)
    return list(torch.from_numpy(rng.choice(ids, size=shape, p=weight / weight.sum())))


def plan(context: Context) -> Plan:
    """Per seed: all passes (they share the machine, so they are one shard), and the cache."""
    config = context.config
    assert isinstance(config, Config)
    shards = []
    for seed in config.seeds:
        shards.append(Shard(("passes",), f"seed{seed}", _timed(context, config, seed)))
        shards.append(Shard(("cache",), f"seed{seed}", _cached(context, config, seed)))
    return Plan(tuple(shards), hashlib.sha256(config.model_dump_json(exclude={"data"}).encode()).hexdigest())


def _timed(context: Context, config: Config, seed: int) -> Callable[[], dict[str, pd.DataFrame]]:
    def shard() -> dict[str, pd.DataFrame]:
        import pandas as pd

        model = enlarged(context, seed)
        batches = traffic(model, config, seed)
        expected = [model(tokens) for tokens in batches[:1]]
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            readers = {
                b: FileRows(Path(folder) / f"block{b}", model.engram(b).table.weight) for b in model.engram_layers
            }
            _pass(model, batches[:1], readers, ahead=False, expected=expected[0])
            for number in range(config.rounds):
                for condition in CONDITIONS:
                    if "cold" in condition:
                        for reader in readers.values():
                            reader.forget()
                    started = time.perf_counter()
                    hits = _pass(model, batches, readers if condition != "memory" else {}, ahead="ahead" in condition)
                    seconds = time.perf_counter() - started
                    tokens = sum(batch.numel() for batch in batches)
                    rows.append((seed, number, condition, tokens / seconds, hits))
        columns = ["seed", "round", "condition", "tokens_per_second", "prefetched"]
        return {"passes": pd.DataFrame(rows, columns=columns)}

    return shard


def _pass(
    model: HouseModel,
    batches: Sequence[torch.Tensor],
    readers: dict,
    *,
    ahead: bool,
    expected: torch.Tensor | None = None,
) -> float:
    """Run the batches; the share of table reads that had been prefetched."""
    if not readers:
        for tokens in batches:
            model(tokens)
        return 0.0
    with offloaded(model, readers) as tables:
        for at, tokens in enumerate(batches):
            if ahead and at == 0:
                tables.ahead(tokens)
            if ahead and at + 1 < len(batches):
                tables.ahead(batches[at + 1])
            logits = model(tokens)
            if expected is not None and not torch.equal(logits, expected):
                raise ValueError("the mapped table gave other logits than the one in memory")
        hits, misses = (sum(getattr(t, name) for t in tables.tables.values()) for name in ("hits", "misses"))
    return hits / (hits + misses)


def _cached(context: Context, config: Config, seed: int) -> Callable[[], dict[str, pd.DataFrame]]:
    def shard() -> dict[str, pd.DataFrame]:
        import pandas as pd

        model = enlarged(context, seed)
        ngram_hash = model.engram(model.engram_layers[0]).ngram_hash
        reads = torch.cat([ngram_hash.addressed_rows(t).flatten() for t in traffic(model, config, seed)])
        rows = [
            (seed, fraction, hit_rate(reads.numpy(), max(1, int(fraction * ngram_hash.rows))))
            for fraction in config.cache_fractions
        ]
        return {"cache": pd.DataFrame(rows, columns=["seed", "cache_fraction", "hit_rate"])}

    return shard


def hit_rate(reads: np.ndarray, size: int) -> float:
    """Share of reads that a cache of the `size` last used rows answers."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for row in reads.tolist():
        if row in cache:
            hits += 1
            cache.move_to_end(row)
        else:
            cache[row] = None
            if len(cache) > size:
                cache.popitem(last=False)
    return hits / len(reads)


def report(context: Context, frames: dict[str, pd.DataFrame]) -> Report:
    """Throughput relative to the table in memory, the median over rounds with its range."""
    import pandas as pd

    rows = []
    for seed, part in frames["passes"].groupby("seed"):
        rate = part.pivot(index="round", columns="condition", values="tokens_per_second")
        for condition in CONDITIONS[1:]:
            ratio = (rate[condition] / rate["memory"]).to_numpy()
            hits = float(part.loc[part["condition"] == condition, "prefetched"].mean())
            rows.append((seed, condition, float(np.median(ratio)), float(ratio.min()), float(ratio.max()), hits))
    ratios = pd.DataFrame(rows, columns=["seed", "condition", "ratio", "low", "high", "prefetched"])
    lines = [
        f"seed {r.seed}, {r.condition}: {r.ratio:.3f} of the throughput with the table in memory ({r.low:.3f} to {r.high:.3f} over "
        f"rounds), {r.prefetched:.0%} of the reads prefetched"
        for r in ratios.itertuples()
    ]
    lines += [
        f"seed {r.seed}: a cache of {r.cache_fraction:.1%} of the rows has {r.hit_rate:.1%} of the reads"
        for r in frames["cache"].itertuples()
    ]
    lines += [f"paper, {name}: {value:.3f}" for name, value in PAPER.items()]
    bars = [
        Bars(f"seed {seed}", *(part[c].to_numpy(dtype=np.float64) for c in ("ratio", "low", "high")))
        for seed, part in ratios.groupby("seed")
    ]
    figure = bars_figure(
        bars, list(CONDITIONS[1:]), title="The table outside memory", y_title="throughput / table in memory",
        reference=[(f"table in memory (paper, in host memory: {min(PAPER.values())} to {max(PAPER.values())})", 1.0)],
    )  # fmt: skip
    return Report({"ratios": ratios}, figure, tuple(lines))


STUDY = Study("offload", Config, plan, report)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
