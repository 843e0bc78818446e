"""A study made of ablations: every task under every condition, in pieces of a few hundred items."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import numpy as np

from engram_interp.hooks.ablation import KINDS
from engram_interp.hooks.optimal import fit_optimal_constants
from engram_interp.hooks.statistics import MemoryStatistics, collect_memory_statistics
from engram_interp.models.protocol import MemoryModel
from engram_interp.probes.ablation import Condition, ablation_effects, interaction, summarise
from engram_interp.probes.tasks import Task
from engram_interp.runs import texts_hash
from engram_interp.studies.pieces import Shard
from engram_interp.studies.program import Context, Plan
from engram_interp.studies.texts import fit_texts, study_tasks

if TYPE_CHECKING:
    import pandas as pd

_SEEDED = ("resample", "equal_norm_random", "hash_permute", "hash_reseed", "prune_rows")
_PIECE = 500
_OPTIMAL_TEXTS = 16  # each step reads them all, forward and backward


def ablation_plan(context: Context, conditions: Sequence[Condition]) -> Plan:
    """Shards of per-item results by seed, task and piece of the task. Random kinds take the shard's seed."""
    config, model = context.config, context.model
    texts = fit_texts(config)

    @lru_cache(maxsize=1)
    def statistics(seed: int) -> MemoryStatistics:
        return fitted_statistics(model, texts, conditions, seed)

    def make(task: Task, seed: int) -> dict[str, pd.DataFrame]:
        seeded = [_seeded(c, seed) for c in conditions]
        effects = ablation_effects(
            model, [task], seeded, statistics=statistics(seed), batch_tokens=config.batch_tokens, seed=seed
        )
        return {"items": effects.items.assign(seed=seed)}

    tasks = {seed: study_tasks(config, model, seed) for seed in config.seeds}
    read = [f"{item}" for s in config.seeds for t in tasks[s] for item in t.items]
    return Plan(
        task_shards("items", tasks, make), hashlib.sha256((texts_hash(texts) + texts_hash(read)).encode()).hexdigest()
    )


def task_shards(
    table: str, tasks: Mapping[int, Sequence[Task]], make: Callable[[Task, int], dict[str, pd.DataFrame]]
) -> tuple[Shard, ...]:
    """A shard for every piece of every task of every seed, in order: small enough to lose little and to share out."""
    return tuple(
        Shard((table,), f"seed{seed}-{task.name}-{number:03}", partial(make, piece, seed))
        for seed, of_seed in tasks.items()
        for task in of_seed
        for number, piece in enumerate(_pieces(task))
    )


def _pieces(task: Task) -> list[Task]:
    """The task in order, cut into equal parts of at most `_PIECE` items (never one item alone)."""
    bounds = np.linspace(0, len(task.items), -(-len(task.items) // _PIECE) + 1).round().astype(int)
    return [replace(task, items=task.items[a:b]) for a, b in pairwise(bounds.tolist())]


def fitted_statistics(
    model: MemoryModel, texts: Sequence[str], conditions: Sequence[Condition], seed: int
) -> MemoryStatistics:
    """What the conditions need to know about the memory; constants are fitted only for `optimal`."""
    fitted = collect_memory_statistics(model, texts, seed=seed)
    if any(c.kind == "optimal" for c in conditions):
        return fit_optimal_constants(model, texts[:_OPTIMAL_TEXTS], fitted)
    return fitted


def _seeded(condition: Condition, seed: int) -> Condition:
    """The condition with the seed of the shard where its kind draws at random; its label stays."""
    if condition.kind not in _SEEDED or "seed" in condition.options:
        return condition
    options = {**condition.options, "seed": seed}
    return condition.model_copy(update={"options": options, "name": condition.label})


def effects_table(items: pd.DataFrame, by: str = "task") -> pd.DataFrame:
    """Paired estimates per seed, task (or "family") and condition."""
    import pandas as pd

    parts = [summarise(frame, by=by).assign(seed=seed) for seed, frame in items.groupby("seed", sort=False)]
    return pd.concat(parts, ignore_index=True)


def interaction_table(items: pd.DataFrame, conditions: Sequence[Condition]) -> pd.DataFrame:
    """Joint ablation against the sum of blocks, per seed."""
    import pandas as pd

    parts = [interaction(frame, conditions).assign(seed=seed) for seed, frame in items.groupby("seed", sort=False)]
    return pd.concat(parts, ignore_index=True)


def first_seed(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first seed: what a figure shows (tables hold every seed)."""
    return table.loc[table["seed"] == table["seed"].iloc[0]]


def headline(table: pd.DataFrame, conditions: Sequence[str], by: str = "task") -> tuple[str, ...]:
    """One line per task and condition: what is retained, raw and above chance, and the change of log p (nats)."""
    rows = first_seed(table)
    chosen = rows[rows["condition"].isin(conditions)]
    return tuple(_line(row, by) for _, row in chosen.iterrows())


def _line(row: pd.Series, by: str) -> str:
    estimable = not cast("str | None", row["reason"])
    kept = [shown(row, f"retained{end}") if estimable else "not estimable" for end in ("", "_above_chance")]
    change = shown(row, "change_logprob")
    return (
        f"{row[by]:18} {row['condition']:28} retained {kept[0]:20} above chance {kept[1]:20} change of log p {change}"
    )


def shown(row: pd.Series, name: str) -> str:
    """An estimate of a row with its interval."""
    return f"{row[name]:.2f} [{row[name + '_low']:.2f}, {row[name + '_high']:.2f}]"


def known_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """The kinds as a tuple.

    Raises: ValueError naming the first unknown one.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"unknown kind {unknown[0]!r}: expected one of {', '.join(KINDS)}")
    return tuple(kinds)
