"""How many bits and how many rows can a table lose before loss, facts or phrases notice?

Rows rounded to 8, 4, 3 and 2 bits with one scale per row or per block of columns, and rows pruned by norm, by use on
the fitted texts, or at random. `noticed` is True where the interval of the change excludes 0. Use counts come from the
fitted texts: with few of them most rows look unused, so give pruning by use a corpus like the one that will be read.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from pydantic import Field

from engram_interp.figures.curve import Curve, curve_figure
from engram_interp.probes.ablation import Condition
from engram_interp.studies import Context, Plan, Report, Study, StudyConfig, main
from engram_interp.studies.ablation import ablation_plan, effects_table, first_seed, headline

TABLES = ("items", "effects", "noticed")


class Config(StudyConfig):
    """`block` columns share a scale in blockwise rounding; `fractions` of the rows are pruned."""

    bits: tuple[int, ...] = (8, 4, 3, 2)
    block: int = Field(ge=1)
    fractions: tuple[float, ...] = Field(min_length=2)
    rules: tuple[str, ...] = ("norm", "use", "random")


def conditions(context: Context) -> list[Condition]:
    """Every rounding and every pruning."""
    config = context.config
    rounded = [{"bits": b, "per": "row"} for b in config.bits]
    rounded += [{"bits": b, "per": "block", "block": config.block} for b in config.bits]
    pruned = [{"fraction": f, "by": rule} for rule in config.rules for f in config.fractions]
    every = [("quantise", o) for o in rounded] + [("prune_rows", o) for o in pruned]
    return [Condition(kind=kind, options=options) for kind, options in every]


def plan(context: Context) -> Plan:
    """One shard per seed and task."""
    return ablation_plan(context, conditions(context))


def report(context: Context, frames: dict[str, pd.DataFrame]) -> Report:
    """What is noticed, and the loss against the share of rows pruned by each rule (mean over tasks)."""
    effects, config = effects_table(frames["items"]), context.config
    noticed = effects[["seed", "task", "condition", "change_loss", "change_loss_low", "change_loss_high"]].copy()
    noticed["noticed"] = (effects["change_loss_low"] > 0) | (effects["change_loss_high"] < 0)
    mean = first_seed(effects).groupby("condition")["change_loss"].mean()
    curves = []
    for rule in config.rules:
        labels = [c.label for c in conditions(context) if c.options.get("by") == rule]
        curves.append(Curve(f"pruned by {rule}", np.array([mean[label] for label in labels])))
    figure = curve_figure(
        curves, list(config.fractions), title="Pruning the table", x_title="fraction of rows removed",
        y_title="change of loss (nats per answer token, mean over tasks)", zero=True,
    )  # fmt: skip
    return Report(
        {"effects": effects, "noticed": noticed}, figure, headline(effects, [c.label for c in conditions(context)])
    )


STUDY = Study("compress_table", Config, plan, report)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
