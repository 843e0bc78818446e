"""How did the memory learn? Its monitor's numbers against the trained tokens, one panel a quantity, one line a gate or layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engram_interp.figures.style import apply_style, category

if TYPE_CHECKING:
    import plotly.graph_objects as go

_PANELS = (
    ("gate (mean over a fixed text)", "gate_mean"),
    ("share of the write in the residual, |Y|² / |h|²", "write_share"),
    ("rows ever read, share of the table", "rows_hit"),
    ("norm of the table's gradient", "gradient_norm"),
    ("norm of the table's update", "update_norm"),
)


def monitor_figure(records: Sequence[Mapping[str, Any]], *, tokens_per_step: int, title: str) -> go.Figure:
    """Curves of `MemoryMonitor` records.

    Args: records: the lines of `memory.jsonl`, as dictionaries; tokens_per_step: turns steps into trained tokens.
    Raises: ValueError for no record.
    """
    from plotly.subplots import make_subplots

    if not records:
        raise ValueError("expected at least one record of the monitor, found none")
    figure = make_subplots(
        len(_PANELS), 1, shared_xaxes=True, vertical_spacing=0.05, subplot_titles=[name for name, _ in _PANELS]
    )
    for row, (_, field) in enumerate(_PANELS, start=1):
        for index, label, x, y in _lines(records, field, tokens_per_step):
            colour, dash, _ = category(index)
            figure.add_scatter(
                x=x, y=y, name=label, legendgroup=label, showlegend=row <= 2, mode="lines",
                line={"color": colour, "dash": dash, "width": 1.6}, row=row, col=1,
            )  # fmt: skip
    figure.update_xaxes(title_text="million trained tokens", row=len(_PANELS), col=1)
    for row, (_, field) in enumerate(_PANELS, start=1):
        bounded = field in ("gate_mean", "rows_hit")
        figure.update_yaxes(range=[0, 1.02] if bounded else None, rangemode="tozero", row=row, col=1)
    apply_style(figure, title=title, height=170 * len(_PANELS) + 120)
    return figure.update_layout(legend={"y": -0.08}, margin={"t": 80})


def _lines(
    records: Sequence[Mapping[str, Any]], field: str, tokens_per_step: int
) -> list[tuple[int, str, list[float], list[float]]]:
    """Style index, label, x and y; gates take the first styles, layers the ones after, so that no style means two things."""
    layers = sorted({record["layer"] for record in records})
    branches = len(records[0]["gate_mean"])
    lines = []
    for number, layer in enumerate(layers):
        own = [record for record in records if record["layer"] == layer]
        x = [record["step"] * tokens_per_step / 1e6 for record in own]
        if field == "gate_mean":
            lines += [
                (number * branches + m, f"block {layer} branch {m}", x, [record[field][m] for record in own])
                for m in range(branches)
            ]
        else:
            y = [record[field] / (record["rows"] if field == "rows_hit" else 1) for record in own]
            lines.append((len(layers) * branches + number, f"block {layer}, all branches", x, y))
    return lines
