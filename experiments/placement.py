"""Which block should hold the memory, alone or in pairs?

Every single block, and every pair at the same number of table columns (paper section 6.2, figure 5: block 2 of 12 alone is best,
a pair with a later block slightly better). Differences are against the first single block; "before attention" of block 0 means that
no context has been read yet. Costs 10 runs of 1 M tokens a seed; `experiments/README.md` has the hours.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

from engram_interp.studies.commands import training_main
from engram_interp.studies.training_figures import differences_figure
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
# Figure 5 of the paper: loss with the memory in block 1 ... 12 alone, nats per token.
PAPER = (1.773, 1.7705, 1.7748, 1.7762, 1.7786, 1.7774, 1.7793, 1.7802, 1.7808, 1.781, 1.7824, 1.7822)


def variants(config: TrainingStudyConfig, base: TrainConfig) -> tuple[Variant, ...]:
    """Single blocks, then pairs with half the columns each."""
    memory, layers = base.model.engram, range(base.model.layers)
    assert memory is not None
    singles = [Variant(name=f"block-{i}", change={"model.engram.blocks": [i]}) for i in layers]
    half = memory.head_width // 2
    pairs = [
        Variant(name=f"blocks-{i}+{j}", change={"model.engram.blocks": [i, j], "model.engram.head_width": half})
        for i, j in combinations(layers, 2)
    ]
    return (*singles, *pairs)


def conclude(config: TrainingStudyConfig, articles: pd.DataFrame) -> tuple[list[str], go.Figure]:
    """The best single block and the best pair of every seed, the pair against the block, and the paper's sweep."""
    runs = compare_runs(articles, "block-0")
    lines, second = [], []
    for seed, part in runs.groupby("seed"):
        loss = part.set_index("variant")["nats_per_token"]
        single, pair = (str(loss[[n for n in loss.index if n.startswith(p)]].idxmin()) for p in ("block-", "blocks-"))
        first = part.set_index("variant").loc[single]
        gap = compare_runs(articles[articles["seed"] == seed], single).set_index("variant").loc[pair]
        lines.append(
            f"seed {seed}: best single {single} ({loss[single]:.4f} nats per token; {shown_difference(first)} bits per byte "
            f"against block 0), best pair {pair} ({loss[pair]:.4f}; {shown_difference(gap)} against that single)"
        )
        second.append(single == "block-1")
    sweep = ", ".join(f"{x - PAPER[0]:+.4f}" for x in PAPER[1:])
    lines.append(
        f"the second block is the best single one in {sum(second)} of {len(second)} seeds; the paper's blocks 2 to 12 against its "
        f"first, nats per token: {sweep}; a pair with a later block slightly better"
    )
    return lines, differences_figure(runs, "Where the memory lies", "block 0 alone")


STUDY = TrainingStudy("placement", TrainingStudyConfig, conclude, variants)

if __name__ == "__main__":
    raise SystemExit(training_main(STUDY))
