"""Figures that training studies share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engram_interp.figures.bars import Bars, bars_figure

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


def differences_figure(runs: pd.DataFrame, title: str, reference: str) -> go.Figure:
    """Difference of every variant from the reference in bits per byte, a bar per seed.

    Args: runs: the table of `compare_runs`.
    """
    bars = [
        Bars(f"seed {seed}", *(part[column].to_numpy(dtype=np.float64) for column in ("difference", "low", "high")))
        for seed, part in runs.groupby("seed")
    ]
    names = list(dict.fromkeys(runs["variant"]))
    y_title = "difference in bits per byte (below 0: better)"
    return bars_figure(bars, names, title=title, y_title=y_title, reference=[(reference, 0.0)])
