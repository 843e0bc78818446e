"""A figure without a browser: the project's Plotly figures as SVG, for pages that must be light, print, and open anywhere.

Draws what the project's figures use (lines, bands, markers, intervals, grouped bars, heat maps, level lines) from the
same figure object as the interactive one, so that both show the same numbers; anything else is an error, never left
out silently. Values are in tooltips. Cost: milliseconds. Misleads nowhere the figure itself does not, but shows less:
no zoom, and hover texts only on markers, bars and cells.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_interp.figures.style import OKABE_ITO, colour_at, ink
from engram_interp.figures.svg_axes import FONT, Frame, legend, make_axis, make_frame, text, text_width

if TYPE_CHECKING:
    import plotly.graph_objects as go

_KNOWN = ("scatter", "bar", "heatmap")
_DASH = {"dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3", "longdash": "11 4", "longdashdot": "11 3 2 3"}
_SYMBOLS = {
    0: "circle",
    1: "square",
    2: "diamond",
    3: "cross",
    4: "x",
    5: "triangle-up",
    17: "star",
}  # Plotly's numbers
# Strokes in a tile of 6 x 6, drawn over the colour of a bar: a second cue beside the colour.
_PATTERNS = {
    "/": "M0 6L6 0", "\\": "M0 0L6 6", "x": "M0 0L6 6M0 6L6 0", "-": "M0 3H6", "|": "M3 0V6", "+": "M0 3H6M3 0V6",
    ".": "M2 3H4",
}  # fmt: skip
_COLOUR_BAR = 56.0
_ON_CELLS = "#ffffff"  # a line drawn over cells needs a dark ground in the legend
# Scoped: the styles of pictures inside one page would reach one another.
_STYLE = (
    f".figure text{{font:{FONT:g}px system-ui,-apple-system,'Segoe UI','Liberation Sans',sans-serif;fill:currentColor}}"
    ".figure path{fill:none;stroke:currentColor}.figure .g{opacity:.15}.figure .a{opacity:.6}"
    ".figure .h{opacity:.7;stroke-dasharray:3 3}"
)


def static_svg(figure: go.Figure, alt: str, *, width: int = 720, height: int = 260, ground: str = "") -> str:
    """The figure as one SVG element.

    Args: alt: what the picture shows, for those who do not see it; height: of the plotting area in pixels; ground: a
        background colour for a file that stands alone, which also makes its text dark.
    Raises: ValueError for a kind of trace this cannot draw.
    """
    traces: list[Any] = list(figure.data)  # type: ignore[arg-type]
    if unknown := sorted({t.type for t in traces} - set(_KNOWN)):
        raise ValueError(f"expected traces of {_KNOWN}, found {unknown}")
    frame = _frame(figure, traces, width, height)
    heat = [t for t in traces if t.type == "heatmap"]
    marks = [part for t in heat for part in _heatmap(t, frame)] + frame.draw()
    marks += _levels(figure, frame) + _bars(traces, frame, width) + _scatters(traces, frame)
    below, end = legend(_entries(traces, width), frame.below(), width)
    title = (figure.layout.title.text or "").replace("<br>", " ")
    size = min(14.0, 14.0 * (width - 8) / (text_width(title) * 1.3 or 1))
    body = text(4, 16, title, extra=f' style="font-size:{size:.1f}px;font-weight:600"')
    paper = f'<rect width="100%" height="100%" fill="{ground}"/>' if ground else ""
    colour = ' color="#1c1e21"' if ground else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {end:.0f}" width="{width}" height="{end:.0f}" role="img"'
        ' class="figure"'
        f'{colour} aria-label="{html.escape(alt, quote=True)}"><style>{_STYLE}</style>{_definitions(traces, width)}{paper}{body}'
        f"{''.join(marks)}{''.join(below)}</svg>"
    )


def _frame(figure: go.Figure, traces: Sequence[Any], width: int, height: int) -> Frame:
    heat = any(t.type == "heatmap" for t in traces)
    x_values = [v for t in traces for v in _list(t.x)]
    y_values: list[Any] = [v for t in traces for v in _list(t.y)]
    for t in traces:
        if t.type != "heatmap":
            y_values += [bound for low, high in _intervals(t) for bound in (low, high)]
    if any(t.type == "bar" for t in traces):
        y_values.append(0.0)
    y_values += [s.y0 for s in figure.layout.shapes if s.type == "line"]
    layout = figure.layout
    x_axis = make_axis(layout.xaxis, x_values, padding=0.02, cells=heat)
    y_axis = make_axis(layout.yaxis, y_values, padding=0.04, cells=heat)
    if not heat:
        return make_frame(x_axis, y_axis, width, height)
    return make_frame(x_axis, y_axis, width, max(height, 0.55 * width), right=_COLOUR_BAR, grid=False)


def _list(values: Any) -> list[Any]:
    return [] if values is None else list(np.asarray(values).tolist())


def _intervals(trace: Any) -> list[tuple[float, float]]:
    """Low and high of every point; the value itself where there is no interval."""
    y, error = _list(trace.y), trace.error_y
    up = _list(error.array) or [0.0] * len(y)
    down = _list(error.arrayminus) or up
    return [(v - d, v + u) for v, d, u in zip(y, down, up, strict=True)]


def _levels(figure: go.Figure, frame: Frame) -> list[str]:
    parts = []
    for shape in figure.layout.shapes:
        if shape.type != "line" or shape.y0 != shape.y1:
            raise ValueError(f"expected level lines only, found a shape of type {shape.type!r}")
        parts.append(f'<path class="h" d="M{frame.left:.1f} {frame.y(shape.y0):.1f}H{frame.right:.1f}"/>')
    notes = figure.layout.annotations
    return parts + [text(frame.right, frame.y(note.y) - 4, note.text, anchor="end") for note in notes]


def _bars(traces: Sequence[Any], frame: Frame, width: int) -> list[str]:
    bars = [t for t in traces if t.type == "bar"]
    step = 0.84 / max(1, len(bars))
    parts = []
    for i, bar in enumerate(bars):
        shift = (i - (len(bars) - 1) / 2) * step
        for x, y, bounds in zip(_list(bar.x), _list(bar.y), _intervals(bar), strict=True):
            if not math.isfinite(y):
                continue
            left, right = frame.x(x, shift - step * 0.46), frame.x(x, shift + step * 0.46)
            top, base = sorted((frame.y(y), frame.y(0.0)))
            box = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{base - top:.1f}"'
            tip = f"<title>{html.escape(f'{bar.name}, {x}: {y:.3g} [{bounds[0]:.3g}, {bounds[1]:.3g}]')}</title>"
            parts.append(f'<rect {box} fill="{_bar_colour(bar, i)}">{tip}</rect>')
            if (pattern := bar.marker.pattern.shape) in _PATTERNS:
                parts.append(f'<rect {box} fill="url(#p{ord(pattern)}w{width})" pointer-events="none"/>')
            parts.append(_whisker(frame.x(x, shift), bounds, frame))
    return parts


def _bar_colour(bar: Any, index: int) -> str:
    return bar.marker.color or OKABE_ITO[index % len(OKABE_ITO)]


def _definitions(traces: Sequence[Any], width: int) -> str:
    # One name per width: a pattern of a picture that the page hides is not drawn in the one it shows.
    used = {t.marker.pattern.shape for t in traces if t.type == "bar"} & set(_PATTERNS)
    tiles = (
        f'<pattern id="p{ord(shape)}w{width}" width="6" height="6" patternUnits="userSpaceOnUse">'
        f'<path d="{_PATTERNS[shape]}" style="stroke:#000;stroke-opacity:.45"/></pattern>'
        for shape in sorted(used)
    )
    return f"<defs>{''.join(tiles)}</defs>" if used else ""


def _whisker(x: float, bounds: tuple[float, float], frame: Frame) -> str:
    low, high = bounds
    if not (math.isfinite(low) and math.isfinite(high)) or low == high:
        return ""
    a, b = frame.y(low), frame.y(high)
    return f'<path d="M{x:.1f} {a:.1f}V{b:.1f}M{x - 3:.1f} {a:.1f}h6M{x - 3:.1f} {b:.1f}h6"/>'


def _scatters(traces: Sequence[Any], frame: Frame) -> list[str]:
    scatters = [t for t in traces if t.type == "scatter"]
    # Series of points over the same categories stand beside one another, unless they are marks on bars.
    dodge = bool(frame.x_axis.categories) and len(scatters) == len(traces)
    parts = []
    for i, trace in enumerate(scatters):
        shift = (i - (len(scatters) - 1) / 2) * 0.6 / len(scatters) if dodge else 0.0
        points = [
            (frame.x(x, shift), frame.y(y), x, y)
            for x, y in zip(_list(trace.x), _list(trace.y), strict=True)
            if y is not None and math.isfinite(y)
        ]
        if trace.fill == "toself":
            outline = "L".join(f"{x:.1f} {y:.1f}" for x, y, *_ in points)
            parts.append(f'<path d="M{outline}Z" style="fill:{trace.fillcolor};stroke:none"/>')
            continue
        colour, mode = _colour(trace, i), trace.mode or "lines"
        if "lines" in mode and points:
            outline = "L".join(f"{x:.1f} {y:.1f}" for x, y, *_ in points)
            parts.append(f'<path d="M{outline}" {_stroke(trace, colour)}/>')
        if "markers" in mode:
            intervals = [b for b, y in zip(_intervals(trace), _list(trace.y), strict=True) if math.isfinite(y)]
            for (x, y, name, value), bounds in zip(points, intervals, strict=True):
                parts.append(_whisker(x, bounds, frame))
                tip = html.escape(f"{trace.name}, {name}: {value:.3g}")
                parts.append(f"<g><title>{tip}</title>{_marker(x, y, trace.marker.symbol, colour)}</g>")
    return parts


def _colour(trace: Any, index: int) -> str:
    return trace.line.color or trace.marker.color or OKABE_ITO[index % len(OKABE_ITO)]


def _stroke(trace: Any, colour: str) -> str:
    dash = f";stroke-dasharray:{_DASH[trace.line.dash]}" if trace.line.dash in _DASH else ""
    return f'style="stroke:{colour};stroke-width:{trace.line.width or 2:g}{dash}"'


def _marker(x: float | int, y: float | int, symbol: Any, colour: str, r: float = 4.5) -> str:
    symbol = _SYMBOLS.get(symbol, symbol) or "circle"
    shape = {
        "circle": f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0Z",
        "square": f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}Z",
        "diamond": f"M{x:.1f} {y - 1.3 * r:.1f}l{1.3 * r} {1.3 * r}l{-1.3 * r} {1.3 * r}l{-1.3 * r} {-1.3 * r}Z",
        "triangle-up": f"M{x:.1f} {y - 1.2 * r:.1f}l{1.2 * r} {2.1 * r}h{-2.4 * r}Z",
        "x": f"M{x - r:.1f} {y - r:.1f}l{2 * r} {2 * r}m0 {-2 * r}l{-2 * r} {2 * r}",
        "line-ew-open": f"M{x - 1.6 * r:.1f} {y:.1f}h{3.2 * r}",
    }.get(symbol, f"M{x - r:.1f} {y:.1f}h{2 * r}M{x:.1f} {y - r:.1f}v{2 * r}")
    if shape.endswith("Z"):
        return f'<path d="{shape}" style="fill:{colour};stroke:#fff;stroke-width:.8"/>'
    return f'<path d="{shape}" style="stroke:{colour};stroke-width:2.5"/>'


def _heatmap(trace: Any, frame: Frame) -> Iterable[str]:
    z, stops = np.asarray(trace.z, dtype=float), tuple(stop[1] for stop in trace.colorscale)
    low, high = float(trace.zmin), float(trace.zmax)
    width, height = abs(frame.x(1) - frame.x(0)), abs(frame.y(1) - frame.y(0))
    labelled = bool(trace.texttemplate) and width > 30
    for i, row in enumerate(z):
        for j, value in enumerate(row):
            x, y = frame.x(trace.x[j]), frame.y(trace.y[i])
            colour = colour_at((value - low) / (high - low), stops)
            yield (
                f'<rect x="{x - width / 2:.1f}" y="{y - height / 2:.1f}" width="{width + 0.3:.1f}" height="{height + 0.3:.1f}" '
                f'fill="{colour}"><title>{html.escape(f"{trace.customdata[i][j]}")}</title></rect>'
            )
            if labelled:
                style = f' style="fill:{ink(colour)};font-size:11px"'
                yield text(x, y + 4 + (height / 4 if height > 24 else 0), f"{value:.2f}", anchor="middle", extra=style)
    left, tall = frame.right + 12, frame.bottom - frame.top
    for k in range(40):
        colour = colour_at((k + 0.5) / 40, stops)
        yield (
            f'<rect x="{left:.1f}" y="{frame.bottom - (k + 1) * tall / 40:.1f}" width="10" height="{tall / 40 + 0.4:.1f}" '
            f'fill="{colour}"/>'
        )
    for value, y in (
        (high, frame.top + 10),
        ((low + high) / 2, (frame.top + frame.bottom) / 2 + 4),
        (low, frame.bottom),
    ):
        yield text(left + 13, y, f"{value:.2g}")
    yield text(frame.right + 6, frame.top - 6, trace.name or "")


def _entries(traces: Sequence[Any], width: int) -> list[tuple[str, str]]:
    """The legend: every named series with its mark as drawn."""
    entries, bars, scatters = [], 0, 0
    for trace in traces:
        if trace.type == "heatmap":
            continue
        if trace.type == "bar":
            colour, bars = _bar_colour(trace, bars), bars + 1
            pattern = trace.marker.pattern.shape
            over = (
                f'<rect width="24" height="12" fill="url(#p{ord(pattern)}w{width})"/>' if pattern in _PATTERNS else ""
            )
            mark = f'<rect width="24" height="12" fill="{colour}"/>{over}'
        else:
            colour, scatters = _colour(trace, scatters), scatters + 1
            mode = trace.mode or "lines"
            ground = '<rect width="24" height="12" fill="#575d6d"/>' if colour == _ON_CELLS else ""
            mark = ground + (f'<path d="M0 6H24" {_stroke(trace, colour)}/>' if "lines" in mode else "")
            mark += _marker(12, 6, trace.marker.symbol, colour) if "markers" in mode else ""
        if trace.name and trace.showlegend is not False:
            entries.append((mark, trace.name))
    return entries
