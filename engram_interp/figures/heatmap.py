"""A layer-by-layer similarity as a heat map, with depth curves drawn over it.

Sequential cividis for values in [0, 1], blue-orange with symmetric limits when something is clearly negative. The
dotted diagonal is "same depth"; every curve has its own colour, dash and marker. Cell text appears while cells are
large enough to read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from engram_interp.figures.style import Theme, apply_style, category, scale, symmetric_limit

if TYPE_CHECKING:
    import plotly.graph_objects as go

_MAX_LABELLED = 16
_NEGATIVE = -0.1  # noise of the unbiased estimator around 0 does not need a signed scale


def heatmap_figure(
    values: Float[np.ndarray, "rows columns"],
    rows: Sequence[int | str],
    columns: Sequence[int | str],
    *,
    title: str,
    row_title: str,
    column_title: str,
    curves: Mapping[str, Float[np.ndarray, "_"]] | None = None,
    low: Float[np.ndarray, "rows columns"] | None = None,
    high: Float[np.ndarray, "rows columns"] | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """Rows upwards, columns to the right, both in index units, so that curves may lie between rows.

    Args: curves: fractional row index for every column (a soft alignment, its null); low, high: shown on hover.
    Raises: ValueError for labels or curves that do not fit the values.
    """
    import plotly.graph_objects as go

    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"expected {len(rows)} x {len(columns)} values for the labels, found {values.shape}")
    signed = bool(np.nanmin(values) < _NEGATIVE)
    limit = symmetric_limit(values) if signed else 1.0
    figure = go.Figure(
        go.Heatmap(
            z=values, x=list(range(len(columns))), y=list(range(len(rows))),
            customdata=_hover(values, rows, columns, low, high),
            colorscale=scale("blue_orange" if signed else "cividis"), zmin=-limit if signed else 0.0, zmax=limit,
            hovertemplate="%{customdata}<extra></extra>", colorbar={"title": {"text": "CKA"}, "thickness": 14},
            texttemplate="%{z:.2f}" if max(values.shape) <= _MAX_LABELLED else None, name="CKA",
        )
    )  # fmt: skip
    last = min(values.shape) - 1
    figure.add_trace(
        go.Scatter(
            x=[0, last], y=[0, last], mode="lines", name="same depth", hoverinfo="skip",
            line={"color": "#ffffff", "width": 1, "dash": "dot"},
        )
    )  # fmt: skip
    for index, (name, depth) in enumerate((curves or {}).items()):
        figure.add_trace(_curve(name, depth, columns, index))
    apply_style(figure, title=title, theme=theme, height=560)
    figure.update_xaxes(title_text=column_title, tickvals=list(range(len(columns))), ticktext=[str(c) for c in columns])
    figure.update_yaxes(title_text=row_title, tickvals=list(range(len(rows))), ticktext=[str(r) for r in rows])
    return figure


def _curve(name: str, depth: np.ndarray, columns: Sequence[int | str], index: int) -> go.Scatter:
    import plotly.graph_objects as go

    if len(depth) != len(columns):
        raise ValueError(f"expected {len(columns)} points, found {len(depth)} in curve {name!r}")
    colour, dash, marker = category(index + 1)  # the first category, blue, drowns in cividis
    return go.Scatter(
        x=list(range(len(columns))), y=depth, name=name, mode="lines+markers",
        line={"color": colour, "dash": dash, "width": 2.5},
        marker={"symbol": marker, "size": 8, "line": {"color": "#ffffff", "width": 1}},
        hovertemplate=f"{name}: %{{y:.2f}}<extra></extra>",
    )  # fmt: skip


def _hover(
    values: np.ndarray,
    rows: Sequence[int | str],
    columns: Sequence[int | str],
    low: np.ndarray | None,
    high: np.ndarray | None,
) -> list[list[str]]:
    def text(i: int, j: int) -> str:
        interval = f" [{low[i, j]:.3f}, {high[i, j]:.3f}]" if low is not None and high is not None else ""
        return f"row {rows[i]}, column {columns[j]}: {values[i, j]:.3f}{interval}"

    return [[text(i, j) for j in range(len(columns))] for i in range(len(rows))]
