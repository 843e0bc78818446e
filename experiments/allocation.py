"""At fixed parameters and work per token, how much should be memory: is there a U?

From pure mixture of experts (ratio 1) to mostly memory: experts keep the ratio of the sparse parameters, table rows take the rest
(paper section 3.1, figure 3 left: a minimum near 75 to 85 % experts). A U needs a ratio inside that beats both ends with intervals
that exclude 0, in every seed. Costs 12 runs of 2 M tokens; `experiments/README.md` has the hours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from engram_interp.figures.curve import Curve, curve_figure
from engram_interp.studies.commands import training_main
from engram_interp.studies.training_study import (
    TrainingStudy,
    TrainingStudyConfig,
    Variant,
    compare_runs,
    shown_difference,
)

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from engram_interp.training.config import TrainConfig

TABLES = ("articles", "runs")
# Figure 3 left of the paper, 5.7 billion parameters: share of experts in the sparse parameters, loss.
PAPER = (
    (1.0, 1.8292),
    (0.95, 1.8201),
    (0.9, 1.8172),
    (0.85, 1.8155),
    (0.8, 1.8170),
    (0.7, 1.8172),
    (0.6, 1.8190),
    (0.51, 1.8227),
    (0.4, 1.8275),
)


class Config(TrainingStudyConfig):
    """`ratios`: share of the sparse parameters in experts, 1 first; `experts`: a block's at ratio 1."""

    ratios: tuple[float, ...] = Field(min_length=3)
    experts: int = Field(ge=3)


def variants(config: TrainingStudyConfig, base: TrainConfig) -> tuple[Variant, ...]:
    """One model per ratio, all of the same size to a row of the table."""
    assert isinstance(config, Config)
    model, memory = base.model, base.model.engram
    assert memory is not None
    per_expert = model.layers * (3 * model.width * model.expert_width + model.width)
    slots = len(memory.blocks) * len(memory.rows_per_head) * memory.heads * memory.head_width
    fixed = (
        len(memory.blocks)
        * model.width
        * (1 + model.streams)
        * memory.heads
        * memory.head_width
        * len(memory.rows_per_head)
    )
    made = []
    for ratio in config.ratios:
        experts = round(ratio * config.experts)
        rows = ((config.experts - experts) * per_expert - fixed) // slots
        change: dict[str, object] = {"model.routed_experts": experts}
        change |= (
            {"model.engram": None} if ratio == 1 else {"model.engram.rows_per_head": [rows] * len(memory.rows_per_head)}
        )
        made.append(Variant(name=f"ratio-{ratio:g}", change=change))
    return tuple(made)


def conclude(config: TrainingStudyConfig, articles: pd.DataFrame) -> tuple[list[str], go.Figure]:
    """Whether a ratio inside beats both ends, seed by seed."""
    assert isinstance(config, Config)
    names = [f"ratio-{ratio:g}" for ratio in config.ratios]
    ends = {end: compare_runs(articles, end).set_index(["variant", "seed"]) for end in (names[0], names[-1])}
    lines, curves, found = [], [], []
    for seed in articles["seed"].unique():
        loss = ends[names[0]].xs(seed, level="seed")["nats_per_token"]
        best = str(loss[names[1:-1]].idxmin())
        gaps = {end: table.loc[(best, seed)] for end, table in ends.items()}
        found.append(all(gap["high"] < 0 for gap in gaps.values()))
        against = ", ".join(f"{shown_difference(gap)} against {end}" for end, gap in gaps.items())
        lines.append(
            f"seed {seed}: lowest inside at {best} ({loss[best]:.4f} nats per token), {against} bits per byte: "
            f"{'a U' if found[-1] else 'no U'}"
        )
        curves.append(Curve(f"seed {seed}", loss[names].to_numpy(dtype=np.float64)))
    lines.append(
        f"a U in {sum(found)} of {len(found)} seeds: {'agrees with the paper' if all(found) else 'not the clear U of the paper'} "
        "(lowest at 0.75 to 0.85)"
    )
    shift = np.mean([curve.mean[0] for curve in curves]) - PAPER[0][1]
    paper = np.interp(config.ratios, *zip(*sorted(PAPER), strict=True)) + shift
    figure = curve_figure(
        [*curves, Curve("paper, 5.7 B parameters, shifted to the same start", paper)], list(config.ratios),
        title="Sparse parameters in experts or in memory", x_title="share in experts", y_title="nats per token",
    )  # fmt: skip
    return lines, figure


STUDY = TrainingStudy("allocation", Config, conclude, variants)

if __name__ == "__main__":
    raise SystemExit(training_main(STUDY))
