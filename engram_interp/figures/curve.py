"""Curves with intervals: one line per arm, told apart by colour, dash and marker, with its band behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    import plotly.graph_objects as go

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star")


@dataclass(frozen=True, eq=False)
class Curve:
    """One line; `low` and `high` are its band, None when there is no interval."""

    label: str
    mean: Float[np.ndarray, " x"]
    low: Float[np.ndarray, " x"] | None = None
    high: Float[np.ndarray, " x"] | None = None


def curve_figure(
    curves: Sequence[Curve],
    x: Sequence[int | float | str],
    *,
    title: str,
    x_title: str,
    y_title: str,
    zero: bool = False,
) -> go.Figure:
    """Lines with bands over common x values.

    Args: zero: draw the line y = 0 (for differences).
    Raises: ValueError for no curve, more than seven (colour and dash would repeat), or lengths that differ from x.
    """
    import plotly.graph_objects as go

    if not 1 <= len(curves) <= len(OKABE_ITO):
        raise ValueError(f"expected 1 to {len(OKABE_ITO)} curves, found {len(curves)}")
    figure = go.Figure()
    for curve, colour, dash, marker in zip(curves, OKABE_ITO, DASHES, MARKERS, strict=False):
        if len(curve.mean) != len(x):
            raise ValueError(f"expected {len(x)} points, found {len(curve.mean)} in curve {curve.label!r}")
        if curve.low is not None and curve.high is not None:
            figure.add_trace(_band(x, curve.low, curve.high, colour, curve.label))
        figure.add_trace(
            go.Scatter(
                x=list(x), y=curve.mean, name=curve.label, legendgroup=curve.label, mode="lines+markers",
                line={"color": colour, "dash": dash, "width": 2}, marker={"symbol": marker, "size": 7},
            )
        )  # fmt: skip
    if zero:
        figure.add_hline(y=0, line={"color": "#666666", "width": 1})
    figure.update_layout(
        title={"text": title}, xaxis_title=x_title, yaxis_title=y_title, hovermode="x unified",
        margin={"l": 70, "r": 20, "t": 60, "b": 60}, height=420,
    )  # fmt: skip
    return figure


def _band(x: Sequence[int | float | str], low: np.ndarray, high: np.ndarray, colour: str, label: str) -> go.Scatter:
    import plotly.graph_objects as go

    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return go.Scatter(
        x=[*x, *reversed(list(x))], y=np.concatenate([high, low[::-1]]), fill="toself", legendgroup=label,
        fillcolor=f"rgba({red},{green},{blue},0.18)", line={"width": 0}, hoverinfo="skip", showlegend=False,
        name=f"{label} band",
    )  # fmt: skip
