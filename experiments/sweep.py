"""Which recipe trains the mini pair best at equal tokens?

One change at a time from the bundled recipe: learning rate, the table's factor and start, table against experts at equal size,
streams, vocabulary. A difference below 0 is better than the first variant. A few million tokens favour fast rates: what wins
here by little need not win after 40 million.
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


def conclude(config: TrainingStudyConfig, articles: pd.DataFrame) -> tuple[list[str], go.Figure]:
    """The best variant per seed, and the differences with their intervals."""
    runs = compare_runs(articles, articles["variant"].iloc[0])
    best = [
        f"seed {seed}: best is {part.loc[part['bits_per_byte'].idxmin(), 'variant']}"
        for seed, part in runs.groupby("seed")
    ]
    return best, differences_figure(runs, "One change at a time", "the bundled recipe")


STUDY = TrainingStudy("sweep", TrainingStudyConfig, conclude)

if __name__ == "__main__":
    raise SystemExit(training_main(STUDY))
