"""Does the memory free attention for what is far back: needles and variables, Engram against MoE?

Generated multi-query needles and variable tracking at several lengths, the longest with a stretched rotary base (paper section 4.3,
table 2: multi-query 84.2 -> 97.0, variable tracking 77.0 -> 87.2 at equal loss). Scored by preferring the right value among those of
the context, so chance is 1/n; a comparison is made only where a model can be told from chance, against the spread of two baseline
seeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from engram_interp.figures.bars import Bars, bars_figure
from engram_interp.measure.statistics import mean_interval, paired_difference
from engram_interp.models.extension import extend_context
from engram_interp.models.house import HouseModel
from engram_interp.models.registry import load
from engram_interp.probes.scoring import score_items
from engram_interp.probes.task_items import Item
from engram_interp.probes.task_long import needle_items, variable_items
from engram_interp.studies import Context, Plan, Report, Shard, Study, StudyConfig, main

if TYPE_CHECKING:
    import pandas as pd

TABLES = ("items", "scores", "differences")
TASKS = {"needle": needle_items, "variable": variable_items}


class Config(StudyConfig):
    """`model` is compared with `baseline`, and that with `control`, its other seed; `lengths` in tokens, ascending."""

    baseline: str = "mini-moe"
    control: str = "mini-moe-control"
    lengths: tuple[int, ...] = Field(min_length=1)


def names(config: Config) -> tuple[str, str, str]:
    """The three models."""
    return config.model, config.baseline, config.control


def plan(context: Context) -> Plan:
    """One shard per seed, model, task and length."""
    config = context.config
    assert isinstance(config, Config)
    models = [load(name) for name in names(config)]
    shards, read = [], []
    for seed in config.seeds:
        for task, build in TASKS.items():
            for length in config.lengths:
                rng = np.random.default_rng((seed, length, *task.encode()))
                items = build(models[0].tokenizer, config.items, rng, length=length)
                read += [f"{item}" for item in items]
                shards += [
                    Shard(
                        ("items",),
                        f"seed{seed}-{task}-{length}-{number}",
                        _scored(model, items, task, length, seed, number),
                    )
                    for number, model in enumerate(models)
                ]
    digest = hashlib.sha256("\0".join(read).encode()).hexdigest()
    return Plan(tuple(shards), digest, {m.identity.name: m.identity.weights_sha256 for m in models})


def _scored(
    model: HouseModel, items: list[Item], task: str, length: int, seed: int, number: int
) -> Callable[[], dict[str, pd.DataFrame]]:
    def shard() -> dict[str, pd.DataFrame]:
        import pandas as pd

        factor = -(-(length + 2) // model.context)
        scores = score_items(extend_context(model, factor), items, [nullcontext])
        frame = pd.DataFrame({
            "seed": seed, "arm": number, "model": model.identity.name, "task": task, "length": length, "stretched": factor,
            "item": [i.id for i in items], "group": [i.group for i in items], "chance": [i.chance for i in items],
            "correct": scores.correct[0], "margin": scores.margin[0],
        })  # fmt: skip
        return {"items": frame}

    return shard


def report(context: Context, frames: dict[str, pd.DataFrame]) -> Report:
    """Accuracy of every model, differences where there is something to compare, and what follows."""
    import pandas as pd

    scores, differences, lines = [], [], []
    for (seed, task, length), part in frames["items"].groupby(["seed", "task", "length"], sort=False):
        arms = [part[part["arm"] == number] for number in range(3)]
        groups, chance = arms[0]["group"].to_numpy(dtype=str), float(arms[0]["chance"].mean())
        values = [arm["correct"].to_numpy() for arm in arms]
        estimates = [mean_interval(value, groups) for value in values]
        for number, (arm, estimate) in enumerate(zip(arms, estimates, strict=True)):
            scores.append({
                "seed": seed, "arm": number, "task": task, "length": length, "stretched": int(arm["stretched"].iloc[0]),
                "model": arm["model"].iloc[0], "value": estimate.value, "low": estimate.low, "high": estimate.high, "chance": chance,
            })  # fmt: skip
        gap, null = (
            paired_difference(values[a], values[b], groups, rng=np.random.default_rng(0)) for a, b in ((0, 1), (1, 2))
        )
        told = max(estimates[0].low, estimates[1].low) > chance
        beyond = max(abs(null.low), abs(null.high))
        verdict = (
            "not estimable: neither model can be told from chance"
            if not told
            else "the memory helps, as in the paper"
            if gap.low > beyond
            else "the memory hurts"
            if gap.high < -beyond
            else "no difference beyond another seed's"
        )
        differences.append({
            "seed": seed, "task": task, "length": length, "difference": gap.value, "low": gap.low, "high": gap.high,
            "null": null.value, "null_low": null.low, "null_high": null.high, "verdict": verdict,
        })  # fmt: skip
        lines.append(f"seed {seed}, {task} at {length} tokens: {gap} (null {null}): {verdict}")
    table = pd.DataFrame(scores)
    first = table[table["seed"] == table["seed"].iloc[0]]
    bars = [
        Bars(str(rows["model"].iloc[0]), *(rows[c].to_numpy(dtype=np.float64) for c in ("value", "low", "high")))
        for _, rows in first.groupby("arm", sort=False)
    ]
    labels = [
        f"{task} {length}" for task, length in first[["task", "length"]].drop_duplicates().itertuples(index=False)
    ]
    figure = bars_figure(
        bars, labels, title="What is far back", y_title="right value preferred",
        reference=[("chance", float(first["chance"].mean()))],
    )  # fmt: skip
    return Report({"scores": table, "differences": pd.DataFrame(differences)}, figure, tuple(lines))


STUDY = Study("long_context", Config, plan, report)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
