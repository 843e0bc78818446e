"""How much of the gate does each ability need?

The gate is scaled from 0 to beyond 1. Read with care: the convolution sees normalised values, so it hardly follows the
scale and only 0 removes it; the curve may jump there. `gate_mean` removes the variation of the gate and keeps its size.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from pydantic import Field

from engram_interp.figures.curve import Curve, curve_figure
from engram_interp.probes.ablation import Condition
from engram_interp.studies import Context, Plan, Report, Study, StudyConfig, main
from engram_interp.studies.ablation import ablation_plan, effects_table, first_seed, headline

TABLES = ("items", "effects")


class Config(StudyConfig):
    """`scales` multiply every gate."""

    scales: tuple[float, ...] = Field(min_length=2)


def doses(context: Context) -> dict[str, float]:
    """Label of each dose, ascending."""
    return {Condition(kind="gate_scale", options={"scale": s}).label: s for s in sorted(set(context.config.scales))}


def plan(context: Context) -> Plan:
    """One shard per seed and task."""
    scaled = [Condition(kind="gate_scale", options={"scale": s}) for s in doses(context).values()]
    return ablation_plan(context, [*scaled, Condition(kind="gate_mean"), Condition(kind="gate_open")])


def report(context: Context, frames: dict[str, pd.DataFrame]) -> Report:
    """Change of log p against the scale of the gate."""
    effects, dose = effects_table(frames["items"]), doses(context)
    rows = first_seed(effects).set_index("condition")
    curves = []
    for task in list(dict.fromkeys(rows["task"]))[:7]:
        of = rows[rows["task"] == task].loc[list(dose)]
        curves.append(
            Curve(task, *(of["change_logprob" + e].to_numpy(dtype=np.float64) for e in ("", "_low", "_high")))
        )
    figure = curve_figure(
        curves, list(dose.values()), title="Dose response of the gate", x_title="gate x",
        y_title="change of log p (nats)",
        zero=True,
    )  # fmt: skip
    return Report({"effects": effects}, figure, headline(effects, [*list(dose)[:1], "gate_mean", "gate_open"]))


STUDY = Study("dose_response", Config, plan, report)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
