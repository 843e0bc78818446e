"""Signed effects as a map: blue lowers, orange raises, white is nothing, limits symmetric about 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    import plotly.graph_objects as go

BLUE_ORANGE = ((0.0, "#0b4f8a"), (0.25, "#6baed6"), (0.5, "#ffffff"), (0.75, "#fdae6b"), (1.0, "#b35806"))


def signed_map(
    values: Float[np.ndarray, "rows columns"], rows: Sequence[str], columns: Sequence[str], *, title: str, unit: str
) -> go.Figure:
    """A heat map with one cell per effect; NaN leaves a gap.

    Raises: ValueError when the labels do not fit the values.
    """
    import plotly.graph_objects as go

    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"expected {len(rows)} x {len(columns)} values, found {values.shape}")
    limit = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    figure = go.Figure(
        go.Heatmap(
            z=values, x=list(range(len(columns))), y=list(rows), zmin=-(limit or 1.0), zmax=limit or 1.0,
            colorscale=[list(stop) for stop in BLUE_ORANGE], colorbar={"title": {"text": unit}},
            customdata=np.tile(np.array(columns, dtype=object), (len(rows), 1)),
            hovertemplate="%{y}<br>%{customdata}<br>%{z:.4f}<extra></extra>",
        )
    )  # fmt: skip
    # Tokens repeat, and plotly merges equal category names: number the columns and show the tokens as labels.
    figure.update_xaxes(tickmode="array", tickvals=list(range(len(columns))), ticktext=list(columns))
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(
        title={"text": title}, margin={"l": 120, "r": 20, "t": 60, "b": 80}, height=120 + 28 * len(rows)
    )
    return figure
