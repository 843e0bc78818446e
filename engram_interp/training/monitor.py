"""Is the memory learning, and is it used?

Attaches to any training loop and logs, per Engram layer and branch: quantiles of the gate and the share of the write in the
residual (on a fixed probe batch, so that curves compare over time), rows of the table hit and never hit and how evenly, and
gradient and update norms of the table. JSON lines always, TensorBoard if it is installed.

    monitor = MemoryMonitor(model, out / "memory.jsonl", probe)
    for step, tokens in enumerate(batches):
        monitor.observe(tokens)             # counts the rows this batch addresses
        loss.backward()
        with monitor.update(step):          # around optimiser.step()
            optimiser.step()

Cost: the hash of each batch, and one forward of the probe every `every` steps; the probe runs uncompiled, so attaching hooks
never invalidates a compiled model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engram_interp.models.house import HouseModel
from engram_interp.shapes import Int64, Tensor

if TYPE_CHECKING:
    from transformers import TrainerCallback

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class MemoryRecord:
    """One layer at one step. `gate_quantiles` and `gate_mean` per branch; norms are Frobenius norms of the table.

    `write_share` is |Y|^2 / |h|^2 over the probe; `rows_hit` counts rows addressed since the start, `hit_top_percent` the share
    of all reads that went to the busiest 1 % of rows.
    """

    step: int
    layer: int
    gate_mean: list[float]
    gate_quantiles: list[list[float]]
    write_share: float
    rows: int
    rows_hit: int
    hit_top_percent: float
    gradient_norm: float
    update_norm: float
    weight_norm: float


class MemoryMonitor:
    """Logs the memory of a house model while it trains; see the module for the three calls."""

    def __init__(self, model: HouseModel, path: Path, probe: Int64[Tensor, "B T"], *, every: int = 100) -> None:
        if every < 1:
            raise ValueError(f"expected every >= 1, found {every}")
        self.model = model
        self.path = path
        self.probe = probe
        self.every = every
        self.hits = {i: np.zeros(model.engram(i).ngram_hash.rows, dtype=np.int64) for i in model.engram_layers}
        self._board = _tensorboard(path.parent)

    @torch.no_grad()
    def observe(self, tokens: Int64[Tensor, "B T"]) -> None:
        """Count the rows that a training batch addresses in every layer."""
        for layer, hits in self.hits.items():
            ngram_hash = self.model.engram(layer).ngram_hash
            rows = ngram_hash.addressed_rows(tokens).flatten().numpy()
            hits += np.bincount(rows, minlength=len(hits))

    @contextmanager
    def update(self, step: int) -> Iterator[None]:
        """Put around the optimiser's step; logs when `step` is a multiple of `every`."""
        if step % self.every or not self.hits:
            yield
            return
        tables = {layer: self.model.engram(layer).table.weight for layer in self.hits}
        before = {layer: table.detach().clone() for layer, table in tables.items()}
        gradients = {layer: _norm(table.grad) for layer, table in tables.items()}
        yield
        gates, shares = self._probe()
        for layer, table in tables.items():
            record = MemoryRecord(
                step=step,
                layer=layer,
                **_gate_numbers(gates[layer]),
                write_share=shares[layer],
                **_hit_numbers(self.hits[layer]),
                gradient_norm=gradients[layer],
                update_norm=_norm(table.detach() - before[layer]),
                weight_norm=_norm(table.detach()),
            )
            self._log(record)

    @torch.no_grad()
    def _probe(self) -> tuple[dict[int, Tensor], dict[int, float]]:
        gates: dict[int, Tensor] = {}
        squares: dict[str, float] = {}

        def keep(value: Tensor, hook: Any) -> None:
            if hook.name.endswith("hook_gate"):
                gates[int(hook.name.split(".")[1])] = value.detach()
            else:
                squares[hook.name] = float(value.square().sum())

        sites = ("engram.hook_gate", "hook_engram_out", "hook_resid_pre")
        names = [f"blocks.{i}.{site}" for i in self.hits for site in sites]
        with torch.compiler.set_stance("force_eager"), self.model.hooks(fwd_hooks=[(name, keep) for name in names]):
            self.model.streams(self.probe)
        return gates, {
            i: squares[f"blocks.{i}.hook_engram_out"] / squares[f"blocks.{i}.hook_resid_pre"] for i in self.hits
        }

    def _log(self, record: MemoryRecord) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
        if self._board is not None:
            for name, value in asdict(record).items():
                if isinstance(value, float):
                    self._board.add_scalar(f"memory/{record.layer}/{name}", value, record.step)
            for branch, mean in enumerate(record.gate_mean):
                self._board.add_scalar(f"memory/{record.layer}/gate_mean/{branch}", mean, record.step)


def _norm(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None else float(tensor.norm())


def _gate_numbers(gates: Tensor) -> dict[str, Any]:
    flat = gates.flatten(0, 1)
    quantiles = torch.quantile(flat, torch.tensor(_QUANTILES), dim=0)
    return {"gate_mean": flat.mean(0).tolist(), "gate_quantiles": quantiles.T.tolist()}


def _hit_numbers(hits: np.ndarray) -> dict[str, Any]:
    busiest = max(1, len(hits) // 100)
    total = max(1, int(hits.sum()))
    top = int(np.partition(hits, len(hits) - busiest)[-busiest:].sum())
    return {"rows": len(hits), "rows_hit": int((hits > 0).sum()), "hit_top_percent": top / total}


def _tensorboard(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory))


def trainer_callback(monitor: MemoryMonitor) -> TrainerCallback:
    """The monitor as a callback of Hugging Face's Trainer; rows are counted from the `input_ids` of every forward."""
    from transformers import TrainerCallback

    class MemoryCallback(TrainerCallback):
        def __init__(self) -> None:
            self.update: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            model.register_forward_pre_hook(self._observe, with_kwargs=True)

        def _observe(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module.training:
                monitor.observe(kwargs["input_ids"] if "input_ids" in kwargs else args[0])

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.update = monitor.update(state.global_step)
            self.update.__enter__()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.update.__exit__(None, None, None)

    return MemoryCallback()
