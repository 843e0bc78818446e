"""Bars with intervals, in groups: one colour and one pattern per condition, so that neither is needed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Okabe & Ito 2008, which stay apart in every common form of colour blindness; grey for black, which a dark page hides.
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#7F7F7F")
PATTERNS = ("", "/", "x", ".", "\\", "+", "-", "|")


@dataclass(frozen=True, eq=False)
class Bars:
    """One condition: a bar per group; NaN leaves a gap. `low` and `high` are the interval."""

    label: str
    value: Float[np.ndarray, " groups"]
    low: Float[np.ndarray, " groups"]
    high: Float[np.ndarray, " groups"]


def bars_figure(
    bars: Sequence[Bars],
    groups: Sequence[str],
    *,
    title: str,
    y_title: str,
    reference: Sequence[tuple[str, float]] = (),
) -> go.Figure:
    """Grouped bars with interval whiskers.

    Args: reference: labelled horizontal lines, such as published values or "unchanged".
    Raises: ValueError for no bars or a condition without one value per group.
    """
    import plotly.graph_objects as go

    if not bars or any(len(b.value) != len(groups) for b in bars):
        raise ValueError(f"expected one value per group ({len(groups)}), found {[len(b.value) for b in bars]}")
    figure = go.Figure()
    for i, bar in enumerate(bars):
        figure.add_trace(
            go.Bar(
                x=list(groups), y=bar.value, name=bar.label,
                error_y={
                    "type": "data", "symmetric": False,
                    "array": bar.high - bar.value, "arrayminus": bar.value - bar.low, "color": "#808080",
                },
                marker={
                    "color": OKABE_ITO[i % len(OKABE_ITO)],
                    "pattern": {"shape": PATTERNS[(i + i // len(OKABE_ITO)) % len(PATTERNS)], "solidity": 0.3},
                    "line": {"color": "#333333", "width": 0.5},
                },
            )
        )  # fmt: skip
    for label, value in reference:
        figure.add_hline(y=value, line={"color": "#666666", "width": 1, "dash": "dot"}, annotation_text=label)
    figure.update_layout(
        title={"text": title},
        yaxis_title=y_title,
        barmode="group",
        margin={"l": 70, "r": 20, "t": 60, "b": 60},
        height=460,
    )
    return figure
