"""Which parts of the memory carry its gain?

One part taken away or exchanged at a time (paper section 6.2, figure 5: token compression, branches and gate matter most, the
convolution least, 4-grams at the same budget hurt). Differences are against the whole memory; a part matters when the interval
lies above 0 in every seed. Costs 8 runs of 1.5 M tokens a seed; `experiments/README.md` has the hours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engram_interp.studies.commands import training_main
from engram_interp.studies.training_figures import differences_figure
from engram_interp.studies.training_study import TrainingStudy, TrainingStudyConfig, compare_runs, shown_difference

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

TABLES = ("articles", "runs")
# Figure 5 of the paper: loss beyond the reference, in nats per token.
PAPER = {"no-conv": 0.0005, "with-4-grams": 0.0017, "no-gate": 0.0046, "no-compression": 0.0057, "one-branch": 0.0065}


def conclude(config: TrainingStudyConfig, articles: pd.DataFrame) -> tuple[list[str], go.Figure]:
    """Every part with its cost in every seed, beside the paper's, and in how many seeds it matters."""
    runs = compare_runs(articles, "whole")
    lines = []
    for name, part in runs[runs["variant"] != "whole"].groupby("variant", sort=False):
        costs = ", ".join(f"seed {run['seed']} {shown_difference(run)}" for _, run in part.iterrows())
        matters, helps = (part["low"] > 0).sum(), (part["high"] < 0).sum()
        verdict = f"matters in {matters} of {len(part)} seeds" + (f", helps when away in {helps}" if helps else "")
        paper = f"; paper {PAPER[name]:+.4f} nats per token" if name in PAPER else ""
        lines.append(f"{name}: {costs} bits per byte, {verdict}{paper}")
    return lines, differences_figure(runs, "One part away at a time", "the whole memory")


STUDY = TrainingStudy("components", TrainingStudyConfig, conclude)

if __name__ == "__main__":
    raise SystemExit(training_main(STUDY))
