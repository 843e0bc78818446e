"""How is a house model trained so that two runs differ only by what they should?

AdamW with a cosine schedule; Engram tables at `table_lr_factor` times the rate and without weight decay. A row of
training data is `<bos>` and the next context-1 tokens; rows are visited in an order that depends on the seed alone, so
every model of a seed sees the same tokens in the same order. The state (weights, moments, step) is saved atomically and
a killed run resumes onto the same trajectory, bit for bit, on the same machine with the same thread count.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt16
from tokenizers import Tokenizer

from engram_interp.models.checkpoint import read_tensors, save_model, save_tensors, write_atomically
from engram_interp.models.house import HouseModel, hashed_vocabulary, initialise
from engram_interp.shapes import Int64, Tensor
from engram_interp.training.config import ConfigError, TrainConfig
from engram_interp.training.corpus import BOS_ID, open_token_file, tokenizer_hash
from engram_interp.training.loss import cross_entropy
from engram_interp.training.monitor import MemoryMonitor

STATE, METRICS, MEMORY, RUN = "state.safetensors", "metrics.jsonl", "memory.jsonl", "run.json"
_PROBE_ROWS = 8  # of the held-out file: the fixed text on which the monitor reads gates


class TokenRows:
    """Training rows cut from a token file: `<bos>` + context-1 tokens, and as targets the context tokens themselves."""

    def __init__(self, tokens: UInt16[np.ndarray, " n"], context: int) -> None:
        self.tokens = tokens
        self.context = context

    def __len__(self) -> int:
        return len(self.tokens) // self.context

    def rows(self, indices: np.ndarray) -> tuple[Int64[Tensor, "B T"], Int64[Tensor, "B T"]]:
        """Inputs and targets of the given rows."""
        starts = np.asarray(indices, dtype=np.int64)[:, None] * self.context
        targets = torch.from_numpy(self.tokens[starts + np.arange(self.context)].astype(np.int64))
        bos = torch.full((len(indices), 1), BOS_ID)
        return torch.cat([bos, targets[:, :-1]], dim=1), targets


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def row_order(rows: int, needed: int, seed: int) -> np.ndarray:
    """Indices of the rows to visit: fresh permutations of the file, as many epochs as needed."""
    rng = np.random.default_rng(seed)
    epochs = [rng.permutation(rows) for _ in range(-(-needed // rows))]
    return np.concatenate(epochs)[:needed]


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to `final_lr_fraction` at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    floor = config.final_lr_fraction
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimiser(model: HouseModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW in three groups: tables (faster, no decay), matrices (decay), gains and embeddings (no decay)."""
    tables, matrices, rest = [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith("table.weight"):
            tables.append(parameter)
        elif (
            parameter.ndim >= 2
            and not name.endswith(("_norm", ".conv"))
            and name not in ("embed.weight", "head.weight")
        ):
            matrices.append(parameter)
        else:
            rest.append(parameter)
    groups = [
        {"params": tables, "weight_decay": 0.0, "lr_factor": config.table_lr_factor},
        {"params": matrices, "weight_decay": config.weight_decay, "lr_factor": 1.0},
        {"params": rest, "weight_decay": 0.0, "lr_factor": 1.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def loss_of(
    model: HouseModel, inputs: Int64[Tensor, "B T"], targets: Int64[Tensor, "B T"], precision: str = "float32"
) -> tuple[Tensor, Tensor]:
    """Mean next-token loss in nats, and the load-balance loss."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        hidden, balance = model.streams(inputs)
        final = model.exit_hidden(hidden)
        return cross_entropy(final.flatten(0, 1), model.unembedding, targets.flatten()), balance


@torch.no_grad()
def held_out_loss(model: HouseModel, rows: TokenRows, count: int, batch: int, precision: str = "float32") -> float:
    """Mean loss in nats per token over the first `count` rows."""
    total, used = 0.0, min(count, len(rows))
    for start in range(0, used, batch):
        indices = np.arange(start, min(start + batch, used))
        total += float(loss_of(model, *rows.rows(indices), precision)[0]) * len(indices)
    return total / used


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: where, after how many steps, with which loss (nats per token), how fast (tokens per second)."""

    directory: Path
    steps: int
    held_out_loss: float | None
    tokens_per_second: float


class Trainer:
    """One resumable run. `run()` goes to the end, or stops after `limit` steps."""

    def __init__(self, config: TrainConfig) -> None:
        torch.set_num_threads(config.threads)
        self.config = config
        if not config.tokenizer.is_file():
            raise ConfigError(f"tokenizer: no such file {config.tokenizer}")
        self.tokenizer = Tokenizer.from_file(str(config.tokenizer))
        digest = tokenizer_hash(self.tokenizer)
        self.rows = TokenRows(open_token_file(config.train_tokens, digest)[0], config.model.context)
        self.held_out = (
            TokenRows(open_token_file(config.held_out_tokens, digest)[0], config.model.context)
            if config.held_out_tokens
            else None
        )
        self.order = row_order(len(self.rows), config.steps * config.batch, config.seed)
        self.model = HouseModel(config.model, hashed_vocabulary(config.model, self.tokenizer))
        initialise(self.model, torch.Generator().manual_seed(config.seed), table_std=config.table_std)
        self.optimiser = make_optimiser(self.model, config)
        self.names = {p: n for n, p in self.model.named_parameters()}
        self.step = 0
        config.out.mkdir(parents=True, exist_ok=True)
        self._claim_directory()
        self.monitor = self._attach_monitor()
        self._resume()
        if config.compile:
            for block in self.model.blocks:
                block.compile(dynamic=False)

    def _attach_monitor(self) -> MemoryMonitor | None:
        if self.config.model.engram is None:
            return None
        rows = self.held_out or self.rows
        probe = rows.rows(np.arange(min(_PROBE_ROWS, len(rows))))[0]
        return MemoryMonitor(self.model, self.config.out / MEMORY, probe, every=self.config.monitor_every)

    # -- state -------------------------------------------------------------------------------------------------------

    def _claim_directory(self) -> None:
        """A directory holds one run: another configuration there is refused, not overwritten."""
        path, text = self.config.out / RUN, self.config.model_dump_json(indent=2)
        if path.is_file() and path.read_text() != text:
            raise ConfigError(f"{path}: this directory holds a run with another configuration; choose another `out`")
        write_atomically(path, lambda part: _write(part, text))

    def _state(self) -> dict[str, Tensor]:
        state = {f"weight.{n}": p for p, n in self.names.items()}
        for p, name in self.names.items():
            slots = self.optimiser.state.get(p, {})
            state[f"mean.{name}"] = slots.get("exp_avg", torch.zeros_like(p))
            state[f"square.{name}"] = slots.get("exp_avg_sq", torch.zeros_like(p))
        hits = self.monitor.hits if self.monitor else {}
        state |= {f"hits.{layer}": torch.from_numpy(count) for layer, count in hits.items()}
        return state | {"step": torch.tensor(self.step)}

    def save(self) -> None:
        """Write the resumable state atomically."""
        save_tensors(self.config.out / STATE, self._state())

    def _resume(self) -> None:
        path = self.config.out / STATE
        if not path.is_file():
            return
        state = read_tensors(path, self._state())
        self.step = int(state["step"])
        with torch.no_grad():
            for p, name in self.names.items():
                p.copy_(state[f"weight.{name}"])
                self.optimiser.state[p] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": state[f"mean.{name}"].clone(),
                    "exp_avg_sq": state[f"square.{name}"].clone(),
                }
        if self.monitor:
            for layer, hits in self.monitor.hits.items():
                hits[:] = state[f"hits.{layer}"].numpy()
        for name in (METRICS, MEMORY):
            self._truncate_log(self.config.out / name)

    def _truncate_log(self, path: Path) -> None:
        """Drop what was logged after the saved state: those steps will be taken again."""
        if path.is_file():
            whole = path.read_text().split("\n")[:-1]  # a kill can leave the last line unfinished
            kept = "".join(line + "\n" for line in whole if json.loads(line)["step"] <= self.step)
            write_atomically(path, lambda part: _write(part, kept))

    # -- steps -------------------------------------------------------------------------------------------------------

    def _train_step(self) -> dict[str, float]:
        config = self.config
        rate = learning_rate(config, self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["lr_factor"]
        chosen = self.order[self.step * config.batch : (self.step + 1) * config.batch]
        inputs, targets = self.rows.rows(chosen)
        if self.monitor:
            self.monitor.observe(inputs)
        loss, balance = loss_of(self.model, inputs, targets, config.precision)
        (loss + config.balance_weight * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"step {self.step}: the gradient norm is {float(norm)}; the saved state is older")
        with self.monitor.update(self.step + 1) if self.monitor else nullcontext():
            self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1
        loss, balance = loss.detach(), balance.detach()
        return {"loss": float(loss), "balance": float(balance), "gradient_norm": float(norm), "learning_rate": rate}

    def _steps(self, limit: int | None) -> Iterator[int]:
        from tqdm import tqdm

        end = self.config.steps if limit is None else min(self.config.steps, self.step + limit)
        with tqdm(
            total=self.config.steps * self.config.tokens_per_step,
            initial=self.step * self.config.tokens_per_step,
            unit="tok",
            unit_scale=True,
            desc=self.config.model.name,
            mininterval=5.0,
        ) as bar:
            while self.step < end:
                yield self.step
                bar.update(self.config.tokens_per_step)

    def run(self, limit: int | None = None) -> TrainResult:
        """Train; save the state every `save_every` steps and at the end, where the checkpoint is written too."""
        config, started, first = self.config, time.monotonic(), self.step
        held_out = None
        with (config.out / METRICS).open("a", buffering=1) as metrics:
            for _ in self._steps(limit):
                record = self._train_step()
                if self.step % config.evaluate_every == 0 or self.step == config.steps:
                    held_out = self._evaluate()
                    record |= {"held_out_loss": held_out} if held_out is not None else {}
                metrics.write(json.dumps({"step": self.step, "time": time.time(), **record}) + "\n")
                if self.step % config.save_every == 0:
                    os.fsync(metrics.fileno())
                    self.save()
        self.save()
        if self.step == config.steps:
            save_model(self.model, self.tokenizer, config.out)
        elapsed = time.monotonic() - started
        speed = (self.step - first) * config.tokens_per_step / elapsed if self.step > first else 0.0
        return TrainResult(config.out, self.step, held_out, speed)

    def _evaluate(self) -> float | None:
        if self.held_out is None:
            return None
        config = self.config
        return held_out_loss(self.model, self.held_out, config.evaluate_rows, config.batch, config.precision)


__all__ = ["TokenRows", "TrainResult", "Trainer", "held_out_loss", "learning_rate", "row_order"]
