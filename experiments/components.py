"""Which parts of the memory carry its gain?

One part taken away or exchanged at a time (paper section 6.2, figure 5: token compression, branches and gate matter most, the
convolution least, 4-grams at the same budget hurt). Differences are against the whole memory; a part matters when the interval
lies above 0. Costs 8 runs of 4 M tokens, about an hour of one core.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engram_interp.studies.commands import training_main
from engram_interp.studies.training_figures import differences_figure
from engram_interp.studies.training_study import TrainingStudy, TrainingStudyConfig, compare_runs

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

TABLES = ("articles", "runs")
# Figure 5 of the paper: loss beyond the reference, in nats per token.
PAPER = {"no-conv": 0.0005, "with-4-grams": 0.0017, "no-gate": 0.0046, "no-compression": 0.0057, "one-branch": 0.0065}


def conclude(config: TrainingStudyConfig, articles: pd.DataFrame) -> tuple[list[str], go.Figure]:
    """Every part with its cost, beside the paper's."""
    runs = compare_runs(articles, "whole")
    lines = []
    for row in runs[runs["variant"] != "whole"].itertuples():
        matters = "matters" if row.low > 0 else "helps when away" if row.high < 0 else "not told from 0"
        paper = f"; paper {PAPER[row.variant]:+.4f} nats per token" if row.variant in PAPER else ""
        lines.append(
            f"seed {row.seed}, {row.variant}: {row.difference:+.4f} [{row.low:.4f}, {row.high:.4f}] bits per byte, {matters}{paper}"
        )
    return lines, differences_figure(runs, "One part away at a time", "the whole memory")


STUDY = TrainingStudy("components", TrainingStudyConfig, conclude)

if __name__ == "__main__":
    raise SystemExit(training_main(STUDY))
