"""Signed contributions of parts to tokens as a heat map: blue against, orange for, white at 0, symmetric limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    import plotly.graph_objects as go

BLUE_ORANGE = ((0.0, "#08519c"), (0.25, "#6baed6"), (0.5, "#ffffff"), (0.75, "#fdae6b"), (1.0, "#a63603"))


def contribution_heatmap(
    parts: Sequence[str], tokens: Sequence[str], values: Float[np.ndarray, "parts T"], *, title: str, unit: str
) -> go.Figure:
    """One row per part, one column per token.

    Raises: ValueError when the labels do not fit the values.
    """
    import plotly.graph_objects as go

    if values.shape != (len(parts), len(tokens)):
        raise ValueError(f"expected values of shape {(len(parts), len(tokens))}, found {values.shape}")
    limit = float(np.abs(values).max(initial=0)) or 1.0
    heatmap = go.Heatmap(
        z=values, x=list(range(len(tokens))), y=list(parts), zmin=-limit, zmax=limit,
        colorscale=[list(stop) for stop in BLUE_ORANGE], colorbar={"title": unit},
        customdata=np.broadcast_to(np.asarray(tokens, dtype=object), values.shape),
        hovertemplate="token %{x} %{customdata}<br>%{y}<br>%{z:+.3f}<extra></extra>",
    )  # fmt: skip
    figure = go.Figure(heatmap)
    figure.update_layout(
        title={"text": title}, height=160 + 18 * len(parts), margin={"l": 170, "r": 20, "t": 50, "b": 90},
        xaxis={
            "tickvals": list(range(len(tokens))), "ticktext": [t.replace(" ", "·") for t in tokens], "tickangle": -60,
        },
        yaxis={"autorange": "reversed"},
    )  # fmt: skip
    return figure
