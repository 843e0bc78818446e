"""Which recipe trains the mini pair best at equal tokens?

One change at a time from the bundled recipe: learning rate, the table's factor and start, table against experts at equal size,
streams, vocabulary. A difference below 0 is better than the first variant. A few million tokens favour fast rates: what wins
here by little need not win after 40 million.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engram_interp.figures.bars import Bars, bars_figure
from engram_interp.studies.commands import training_main
from engram_interp.studies.training_study import TrainingStudy, TrainingStudyConfig

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

TABLES = ("articles", "runs")


def conclude(runs: pd.DataFrame) -> tuple[list[str], go.Figure]:
    """The best variant per seed, and the differences with their intervals."""
    best = [
        f"seed {seed}: best is {part.loc[part['bits_per_byte'].idxmin(), 'variant']}"
        for seed, part in runs.groupby("seed")
    ]
    bars = [
        Bars(f"seed {seed}", *(part[c].to_numpy(dtype=np.float64) for c in ("difference", "low", "high")))
        for seed, part in runs.groupby("seed")
    ]
    figure = bars_figure(
        bars, list(dict.fromkeys(runs["variant"])), title="One change at a time", reference=[("first variant", 0.0)],
        y_title="difference in bits per byte (below 0: better)",
    )  # fmt: skip
    return best, figure


STUDY = TrainingStudy("sweep", TrainingStudyConfig, conclude)

if __name__ == "__main__":
    raise SystemExit(training_main(STUDY))
