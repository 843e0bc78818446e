"""What do the probes cost beside a plain forward, on this machine?

All candidates run interleaved in one process on the same tokens, so that a machine that slows down slows all of them; what is
quoted is the ratio to the plain forward of the same round: median, and the range of the middle half of the rounds. Absolute times
are printed for orientation only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from engram_interp.kernels.lens import lens_readings
from engram_interp.models.house import HouseModel
from engram_interp.shapes import Int64, Tensor

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class BenchResult:
    """Seconds per round and candidate; `plain forward` is the unit of the ratios."""

    seconds: dict[str, tuple[float, ...]]
    tokens: int
    threads: int
    matrix_gflops: float

    def table(self) -> pd.DataFrame:
        """One row per candidate: ratio to the plain forward (median and quartiles), tokens per second."""
        import pandas as pd

        plain = np.array(self.seconds["plain forward"])
        rows = []
        for name, seconds in self.seconds.items():
            ratio = np.array(seconds) / plain
            low, middle, high = np.quantile(ratio, [0.25, 0.5, 0.75])
            rows.append(
                {
                    "candidate": name,
                    "ratio": middle,
                    "ratio_q25": low,
                    "ratio_q75": high,
                    "tokens_per_second": self.tokens / float(np.median(seconds)),
                }
            )
        return pd.DataFrame(rows)


@torch.no_grad()
def bench(model: HouseModel, *, batch: int = 8, rounds: int = 7, seed: int = 0, threads: int = 1) -> BenchResult:
    """Time a forward, its captures and the lens on random tokens of a full context.

    Args: batch: texts per forward; rounds: interleaved repetitions after one warm-up.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, model.vocab_size, (batch, model.context), generator=generator)
    candidates = _candidates(model, tokens)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    try:
        for round_ in range(rounds + 1):
            for name, run in candidates.items():
                start = time.perf_counter()
                run()
                if round_:  # the first round warms caches and allocator
                    seconds[name].append(time.perf_counter() - start)
        rate = _matrix_gflops()
    finally:
        torch.set_num_threads(before)
    return BenchResult({k: tuple(v) for k, v in seconds.items()}, tokens.numel(), threads, rate)


def _candidates(model: HouseModel, tokens: Int64[Tensor, "B T"]) -> dict[str, Callable[[], object]]:
    return {
        "plain forward": lambda: model(tokens),
        "plain forward again (noise)": lambda: model(tokens),
        "all residuals captured": lambda: model.run_with_cache(tokens, "blocks.*.hook_resid_post"),
        "everything captured": lambda: model.run_with_cache(tokens),
        "exact lens, all sites and quantities": lambda: _lens(model, tokens),
        "logits of all sites stacked": lambda: _stacked(model, tokens),
    }


def _lens(model: HouseModel, tokens: Int64[Tensor, "B T"]) -> object:
    sites = torch.stack([model.exit_hidden(h).flatten(0, 1) for h in model.residuals(tokens)])
    return lens_readings(sites, sites[-1], model.unembed, tokens.roll(-1, 1).flatten())


def _stacked(model: HouseModel, tokens: Int64[Tensor, "B T"]) -> Tensor:
    """The obvious lens: log-probabilities of every site in memory, then KL."""
    final = model.unembed(model.exit_hidden(model.residuals(tokens)[-1])).log_softmax(-1)
    every = torch.stack([model.unembed(model.exit_hidden(h)) for h in model.residuals(tokens)]).log_softmax(-1)
    return (final.exp() * (final - every)).sum(-1)


def _matrix_gflops(size: int = 1024, repeats: int = 10) -> float:
    a, b = torch.ones(size, size), torch.ones(size, size)
    torch.mm(a, b)
    start = time.perf_counter()
    for _ in range(repeats):
        torch.mm(a, b)
    return repeats * 2 * size**3 / (time.perf_counter() - start) / 1e9
