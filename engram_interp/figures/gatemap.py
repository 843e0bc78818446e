"""The gates of a text as a picture: one row per layer and branch, one column per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


def row_labels(layers: Sequence[int], branches: int) -> list[str]:
    """`block 1 · branch 0`, ..."""
    return [f"block {layer} · branch {m}" for layer in layers for m in range(branches)]


def gate_heatmap(
    tokens: Sequence[str], layers: Sequence[int], gates: Float[np.ndarray, "T E M"], *, title: str
) -> go.Figure:
    """Heat map of every gate on the fixed scale 0 to 1, with 0.5 ("no evidence") marked on the colour bar."""
    import plotly.graph_objects as go

    branches = gates.shape[2]
    z = gates.reshape(len(tokens), -1).T
    labels = row_labels(layers, branches)
    text = np.broadcast_to(np.asarray([show(t) for t in tokens], dtype=object), z.shape)
    heatmap = go.Heatmap(
        z=z,
        x=list(range(len(tokens))),
        y=labels,
        zmin=0,
        zmax=1,
        colorscale="Cividis",
        customdata=text,
        hovertemplate="token %{x} %{customdata}<br>%{y}<br>gate %{z:.3f}<extra></extra>",
        colorbar={"title": "gate", "tickvals": [0, 0.5, 1], "ticktext": ["0", "0.5 no evidence", "1"]},
    )
    figure = go.Figure(heatmap)
    figure.update_layout(
        title={"text": f"When does the memory speak? {title}"},
        height=140 + 34 * len(labels),
        margin={"l": 120, "r": 20, "t": 50, "b": 90},
        xaxis={"tickvals": list(range(len(tokens))), "ticktext": [show(t) for t in tokens], "tickangle": -60},
        yaxis={"autorange": "reversed"},
    )
    return figure


def show(token: str) -> str:
    """A token with its white space made visible."""
    return token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥") or "∅"


def gate_strata_figure(table: pd.DataFrame) -> go.Figure:
    """Mean gate and interval by stratum (columns `layer`, `branch`, `stratum`, `mean`, `low`, `high`)."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for row, (key, part) in enumerate(table.groupby(["layer", "branch"])):
        layer, branch = cast("tuple[int, int]", key)
        figure.add_scatter(
            x=part["stratum"],
            y=part["mean"],
            error_y={"array": part["high"] - part["mean"], "arrayminus": part["mean"] - part["low"]},
            mode="markers",
            marker={"symbol": row, "size": 10},
            name=f"block {layer} · branch {branch}",
        )
    figure.add_hline(y=0.5, line_dash="dot", annotation_text="no evidence")
    figure.update_yaxes(range=[0, 1], title="mean gate (95 % over texts)")
    figure.update_layout(title="Where does the memory speak?")
    return figure
