"""A study made of ablations: every task under every condition, one shard per seed and task."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from engram_interp.hooks.ablation import KINDS
from engram_interp.hooks.optimal import fit_optimal_constants
from engram_interp.hooks.statistics import MemoryStatistics, collect_memory_statistics
from engram_interp.models.protocol import MemoryModel
from engram_interp.probes.ablation import Condition, ablation_effects, interaction, summarise
from engram_interp.probes.tasks import Task
from engram_interp.runs import texts_hash
from engram_interp.studies.program import Context, Plan, Shard
from engram_interp.studies.texts import fit_texts, study_tasks

if TYPE_CHECKING:
    import pandas as pd

_SEEDED = ("resample", "equal_norm_random", "hash_permute", "hash_reseed", "prune_rows")
_OPTIMAL_TEXTS = 16  # each step reads them all, forward and backward


def ablation_plan(context: Context, conditions: Sequence[Condition]) -> Plan:
    """One shard of per-item results per seed and task. Random kinds take the shard's seed."""
    config, model = context.config, context.model
    texts = fit_texts(config)

    @lru_cache(maxsize=1)
    def statistics(seed: int) -> MemoryStatistics:
        return fitted_statistics(model, texts, conditions, seed)

    def make(task: Task, seed: int) -> Callable[[], pd.DataFrame]:
        def shard() -> pd.DataFrame:
            seeded = [_seeded(c, seed) for c in conditions]
            effects = ablation_effects(
                model, [task], seeded, statistics=statistics(seed), batch_tokens=config.batch_tokens, seed=seed,
                progress=True,
            )  # fmt: skip
            return effects.items.assign(seed=seed)

        return shard

    tasks = {seed: study_tasks(config, model, seed) for seed in config.seeds}
    shards = tuple(Shard("items", f"seed{s}-{t.name}", make(t, s)) for s in config.seeds for t in tasks[s])
    read = [f"{item}" for s in config.seeds for t in tasks[s] for item in t.items]
    return Plan(shards, hashlib.sha256((texts_hash(texts) + texts_hash(read)).encode()).hexdigest())


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


def effects_table(items: pd.DataFrame) -> pd.DataFrame:
    """Paired estimates per seed, task and condition."""
    import pandas as pd

    parts = [summarise(frame).assign(seed=seed) for seed, frame in items.groupby("seed", sort=False)]
    return pd.concat(parts, ignore_index=True)


def interaction_table(items: pd.DataFrame, conditions: Sequence[Condition]) -> pd.DataFrame:
    """Joint ablation against the sum of blocks, per seed."""
    import pandas as pd

    parts = [interaction(frame, conditions).assign(seed=seed) for seed, frame in items.groupby("seed", sort=False)]
    return pd.concat(parts, ignore_index=True)


def first_seed(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first seed: what a figure shows (tables hold every seed)."""
    return table.loc[table["seed"] == table["seed"].iloc[0]]


def headline(table: pd.DataFrame, conditions: Sequence[str]) -> tuple[str, ...]:
    """One line per task and condition: retained fraction above chance and change of log p, with intervals."""
    rows = first_seed(table)
    chosen = rows[rows["condition"].isin(conditions)]
    return tuple(_line(row) for _, row in chosen.iterrows())


def _line(row: pd.Series) -> str:
    def interval(name: str) -> str:
        return f"{row[name]:.3f} [{row[name + '_low']:.3f}, {row[name + '_high']:.3f}]"

    reason = cast("str | None", row["reason"])
    kept = "not estimable" if reason else interval("retained_above_chance")
    change = interval("change_logprob")
    return f"{row['task']:18} {row['condition']:28} retained above chance {kept:26} change of log p {change}"


def known_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """The kinds as a tuple.

    Raises: ValueError naming the first unknown one.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"unknown kind {unknown[0]!r}: expected one of {', '.join(KINDS)}")
    return tuple(kinds)
