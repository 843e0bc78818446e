"""How fast does a configuration train on this machine, and how far is that from the machine's own matrix products?

One process per core, one thread each, as the bundled models are trained: on two cores two models train side by side. Each
process alternates between timing a bare fp32 matrix product and training steps on random tokens, so that both see the same
machine. The floor is `training FLOPs per token / measured rate`; the fraction printed is floor over measured time.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier

import numpy as np
import torch

from engram_interp.memory import CompressedVocabulary
from engram_interp.models.cost import active_flops
from engram_interp.models.house import HouseModel, initialise
from engram_interp.training.config import TrainConfig
from engram_interp.training.train import loss_of, make_optimiser

_SIZE = 1024  # the bare product is 1024 x 1024 x 1024
_ROUNDS, _STEPS = 5, 3


@dataclass(frozen=True)
class TrainingSpeed:
    """Sums over processes: tokens per second, bare matrix rate in GFLOP/s; FLOPs per trained token; fraction of the floor."""

    tokens_per_second: float
    matrix_gflops: float
    flops_per_token: float
    processes: int

    @property
    def fraction(self) -> float:
        """Share of the bare matrix rate that training reaches, counting its matrix products only."""
        return self.tokens_per_second * self.flops_per_token / (self.matrix_gflops * 1e9)

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_second:.0f} tokens/s in {self.processes} one-thread processes, "
            f"{self.flops_per_token / 1e6:.1f} MFLOP per token, {self.fraction:.0%} of the {self.matrix_gflops:.0f} GFLOP/s "
            "of bare fp32 matrix products measured in the same run"
        )


def measure_training_speed(config: TrainConfig, processes: int) -> TrainingSpeed:
    """Train a fresh model of the configuration for a few steps in every process and time it.

    Raises: RuntimeError when a process fails.
    """
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(processes), context.Queue()
    workers = [context.Process(target=_work, args=(config, barrier, queue)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    results = []
    while len(results) < processes:
        try:
            results.append(queue.get(timeout=5))
        except Exception:  # noqa: BLE001 - queue.Empty; look whether somebody died
            if any(worker.exitcode not in (None, 0) for worker in workers):
                for worker in workers:
                    worker.terminate()
                raise RuntimeError("a training process failed; its message is above") from None
    for worker in workers:
        worker.join()
    tokens, gflops = (sum(column) for column in zip(*results, strict=True))
    flops = 3 * active_flops(config.model).total  # the backward pass costs twice the forward
    return TrainingSpeed(tokens, gflops, flops, processes)


def _work(config: TrainConfig, barrier: Barrier, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    step = _prepare(config)
    step()
    seconds, rates = [], []
    for _ in range(_ROUNDS):
        barrier.wait()
        rates.append(_matrix_gflops())
        barrier.wait()
        start = time.perf_counter()
        for _ in range(_STEPS):
            step()
        seconds.append((time.perf_counter() - start) / _STEPS)
    queue.put((config.tokens_per_step / statistics.median(seconds), statistics.median(rates)))


def _prepare(config: TrainConfig):  # noqa: ANN202
    vocabulary = _vocabulary_of_size(config)
    model = initialise(HouseModel(config.model, vocabulary), torch.Generator().manual_seed(config.seed))
    optimiser = make_optimiser(model, config)
    if config.compile:
        for block in model.blocks:
            block.compile(dynamic=False)
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.batch, config.model.context)

    def step() -> None:
        tokens = torch.randint(3, config.model.vocab_size, (2, *shape), generator=generator)
        loss, balance = loss_of(model, tokens[0], tokens[1], config.precision)
        (loss + config.balance_weight * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimiser.step()
        optimiser.zero_grad()

    return step


def _vocabulary_of_size(config: TrainConfig) -> CompressedVocabulary:
    """Any surjection of the right size: speed does not depend on which tokens share an id."""
    size = config.model.engram.compressed_vocab_size if config.model.engram else config.model.vocab_size
    return CompressedVocabulary(np.arange(config.model.vocab_size) % size, tuple(map(str, range(size))))


def _matrix_gflops() -> float:
    a, b = torch.ones(_SIZE, _SIZE), torch.ones(_SIZE, _SIZE)
    out = torch.empty(_SIZE, _SIZE)
    torch.mm(a, b, out=out)
    start, repeats = time.perf_counter(), 20
    for _ in range(repeats):
        torch.mm(a, b, out=out)
    return repeats * 2 * _SIZE**3 / (time.perf_counter() - start) / 1e9
