"""What do the probes cost on this machine, beside the arithmetic they need?

The candidates of a group run interleaved, in a new order each round, in one process on the same inputs, so that a machine
that slows down slows all of them; what is quoted is the ratio to the group's first candidate in the same round: median, and
the range of the middle half of the rounds. On one thread the clock is the process's CPU time, which other programs disturb
least; on several it is wall time. Beside a ratio stand the project's target, the largest it accepts, and the error that a
lens stated (nats). Absolute times are for orientation only. Results are a run folder: `ratios`, and every single time in
`seconds`.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from engram_interp.models.house import HouseModel
from engram_interp.runs import texts_hash
from engram_interp.runs.folder import start_run
from engram_interp.studies.bench_candidates import (
    Candidates,
    bench_model,
    cka_candidates,
    forward_candidates,
    ngram_candidates,
    vocabulary_candidates,
)
from engram_interp.studies.bench_peers import cka_peer_candidates, peer_candidates

if TYPE_CHECKING:
    import pandas as pd

Group = Literal["forward", "vocabulary", "cka", "ngram", "peers"]
Report = Callable[[str], object]

_MOST, _SHORT = 20, 10.0  # times as many rounds, while all of them take less than so many seconds


@dataclass(frozen=True)
class BenchResult:
    """Seconds per round of every candidate of a group (none where it does not run); the first is the unit of the ratios."""

    group: str
    candidates: Candidates
    seconds: dict[str, tuple[float, ...]]
    errors: dict[str, float]
    threads: int

    def table(self) -> pd.DataFrame:
        """One row per candidate: ratio to the unit (median and quartiles), target, stated error, median seconds, note."""
        import pandas as pd

        unit = np.array(self.seconds.get(self.candidates[0].name, ()))
        rows = []
        for candidate in self.candidates:
            seconds = np.array(self.seconds.get(candidate.name, ()))
            low, middle, high = (
                np.quantile(seconds / unit, [0.25, 0.5, 0.75]) if len(seconds) and len(unit) else [np.nan] * 3
            )
            rows.append(
                {
                    "group": self.group, "threads": self.threads, "candidate": candidate.name, "ratio": middle,
                    "ratio_q25": low, "ratio_q75": high, "target": np.nan if candidate.target is None else candidate.target,
                    "error": self.errors.get(candidate.name, np.nan),
                    "seconds": float(np.median(seconds)) if len(seconds) else np.nan, "note": candidate.note,
                }
            )  # fmt: skip
        return pd.DataFrame(rows)


@torch.no_grad()
def bench(
    group: str,
    candidates: Candidates,
    *,
    rounds: int = 7,
    threads: int = 1,
    seed: int = 0,
    report: Report = lambda line: None,
) -> BenchResult:
    """Time candidates, interleaved, after one warm-up round; what takes milliseconds gets more rounds than asked for.

    Args: seed: of the order in each round, so that no candidate always follows the same other; report: takes a line as each
        candidate has warmed up, and one per row at the end.
    Raises: ValueError for fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"expected at least one round, found {rounds}")
    clock = time.process_time if threads == 1 else time.perf_counter
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    turns = [c for c in candidates if c.run is not None]
    seconds: dict[str, list[float]] = {c.name: [] for c in turns}
    errors: dict[str, float] = {}
    head = f"{group}, {threads} thread{'s' * (threads > 1)}"
    order = np.random.default_rng(seed)
    try:
        begun = clock()
        for round_ in range(_MOST * rounds + 1):
            if round_ > rounds and clock() - begun > _SHORT:
                break
            for candidate in turns:
                start = clock()
                result = candidate.run()  # type: ignore[misc]
                took = candidate.times * (clock() - start)
                error = getattr(result, "error", None)
                del result  # here, or the next candidate would be timed giving its memory back
                if round_:  # the first round warms caches and allocator
                    seconds[candidate.name].append(took)
                    continue
                report(f"{head}: {candidate.name}, {took:.2f} s to warm up")
                if isinstance(error, float):
                    errors[candidate.name] = error
            order.shuffle(turns)
    finally:
        torch.set_num_threads(before)
    found = BenchResult(group, candidates, {name: tuple(v) for name, v in seconds.items()}, errors, threads)
    for row in found.table().to_dict("records"):
        report(f"{head}: {row['candidate']}, {row['note'] or f'''{row['ratio']:.3f} of the unit'''}")
    return found


def bench_groups(groups: Sequence[str], model: HouseModel | None, seed: int = 0) -> dict[str, Callable[[], Candidates]]:
    """How to make the candidates of some groups; made one at a time, so that only one group's inputs lie in memory.

    Args: model: what the forward group times; None is the random model of 12 blocks and width 256.
    Raises: ValueError listing the groups.
    """
    if unknown := set(groups) - set(get_args(Group)):
        raise ValueError(f"unknown group {sorted(unknown)[0]!r}: expected some of {', '.join(get_args(Group))}")

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    every: dict[str, dict[str, Callable[[], Candidates]]] = {
        "forward": {"forward": lambda: forward_candidates(model or bench_model(generator()), generator())},
        "vocabulary": {"vocabulary": lambda: vocabulary_candidates(generator())},
        "cka": {"cka": lambda: cka_candidates(generator())},
        "ngram": {
            "ngram, bundled table": lambda: ngram_candidates(
                generator(), rows_per_head=16384, head_width=8, vocab_size=8192
            ),
            "ngram, 27B table": lambda: ngram_candidates(
                generator(), rows_per_head=2_262_400, head_width=80, vocab_size=129_280
            ),
        },
        "peers": {
            "peers": lambda: peer_candidates(generator()),
            "cka peers": lambda: cka_peer_candidates(generator()),
        },
    }
    return {name: make for group in groups for name, make in every[group].items()}


def run_bench(
    groups: Sequence[str],
    model: HouseModel | None,
    out: Path,
    *,
    rounds: int,
    threads: Sequence[int],
    seed: int = 0,
    report: Report = lambda line: None,
) -> pd.DataFrame:
    """Time groups at each number of threads and keep the result; a stopped run goes on with the groups that are missing.

    Raises: ValueError for an unknown group; RunError when the folder holds another run.
    """
    import pandas as pd

    makers = bench_groups(groups, model, seed)
    config: dict[str, object] = {
        "groups": list(groups), "rounds": rounds, "threads": list(threads), "processor": platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    identity = {model.identity.name: model.identity.weights_sha256} if model else {}
    with start_run(
        out, study="bench", config=config, seeds=[seed], models=identity, texts_sha256=texts_hash([])
    ) as run:
        shards = []
        for number, (name, make) in enumerate(makers.items()):
            made = cache(make)  # once for all numbers of threads, and not at all where every shard is there
            for count in threads:
                shards.append(f"{number}.threads-{count}")
                if shards[-1] not in run.done_shards("ratios"):
                    result = bench(name, made(), rounds=rounds, threads=count, seed=seed, report=report)
                    run.write_shard("seconds", shards[-1], pd.DataFrame(result.seconds).melt(var_name="candidate"))
                    run.write_shard("ratios", shards[-1], result.table())
        run.gather("seconds", shards)
        return run.gather("ratios", shards)
