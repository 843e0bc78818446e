"""One reading per layer and token: residual sites upwards, tokens to the right, the site's first choice on hover."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from engram_interp.figures.gatemap import show
from engram_interp.figures.style import apply_style, scale

if TYPE_CHECKING:
    import plotly.graph_objects as go


def lens_map(
    values: Float[np.ndarray, "L T"],
    tokens: Sequence[str],
    choices: Sequence[Sequence[str]],
    *,
    title: str,
    unit: str,
    largest: float | None = None,
    memories: Sequence[int] = (),
) -> go.Figure:
    """Heat map of a lens reading.

    Args: choices[l][t]: first choice of site l after token t; largest: end of the colour range, to share it between
        figures (None: the largest value); memories: blocks with an Engram, marked at the first site that holds their
        write (block + 1).
    Raises: ValueError for labels that do not fit the values.
    """
    import plotly.graph_objects as go

    if values.shape != (len(choices), len(tokens)) or any(len(row) != len(tokens) for row in choices):
        raise ValueError(f"expected {len(choices)} x {len(tokens)} values and choices, found {values.shape}")
    places = [f"{t} {show(token)}" for t, token in enumerate(tokens)]  # as categories, of which Plotly labels what fits
    labels = ["emb." if site == 0 else str(site) for site in range(len(values))]
    figure = go.Figure(
        go.Heatmap(
            z=values, x=places, y=list(range(len(values))), zmin=0.0,
            zmax=float(np.nanmax(values)) if largest is None else largest, colorscale=scale(),
            customdata=[[f"{show(tokens[t])} → {show(row[t])}" for t in range(len(tokens))] for row in choices],
            hovertemplate="layer %{y}, token %{x}<br>%{customdata}<br>%{z:.3f}<extra></extra>",
            colorbar={"title": {"text": unit, "side": "right"}, "thickness": 14},
        )
    )  # fmt: skip
    apply_style(figure, title=title, height=150 + 17 * len(values))
    figure.update_layout(margin={"l": 50, "r": 10, "t": 36, "b": 70})
    for block in memories:
        figure.add_hline(y=block + 0.5, line={"color": "#d55e00", "width": 2, "dash": "dash"})
    figure.update_xaxes(type="category", tickangle=-60)
    figure.update_yaxes(tickvals=list(range(len(values))), ticktext=labels, title_text="layer")
    return figure
