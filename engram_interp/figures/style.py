"""One look for every figure: palettes that survive colour blindness and grey print, and a layout for light and dark
pages.

Sequential values are cividis (lightness rises evenly), signed values blue-orange with symmetric limits, categories
Okabe-Ito with dash and marker as a second cue: never colour alone. Cost: none. Misleads when a sequential scale is
stretched over tiny differences: give the limits whenever the quantity has natural ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import plotly.graph_objects as go

Theme = Literal["light", "dark"]

# Nine equally spaced stops of cividis (Nunez, Anderton & Renslow 2018).
CIVIDIS = ("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#fee838")
# Diverging, blue for negative, orange for positive, nearly white in the middle; equal lightness at equal distance.
BLUE_ORANGE = ("#134b73", "#2f79ab", "#79add2", "#bfd9ea", "#f5f4f2", "#f8d3a8", "#ef9f4f", "#c86a14", "#7f3b08")
# Okabe & Ito 2008; black is left to text and axes.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "5px,2px")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star")

FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', sans-serif"
_PAGE: dict[Theme, dict[str, str]] = {
    "light": {"paper": "#ffffff", "plot": "#ffffff", "text": "#1c1e21", "muted": "#5b6068", "grid": "#e3e5e8"},
    "dark": {"paper": "#0e1117", "plot": "#0e1117", "text": "#f2f3f5", "muted": "#a7adb7", "grid": "#2c313a"},
}


def scale(name: Literal["cividis", "blue_orange"] = "cividis") -> list[list[float | str]]:
    """A Plotly colour scale."""
    stops = CIVIDIS if name == "cividis" else BLUE_ORANGE
    return [[i / (len(stops) - 1), colour] for i, colour in enumerate(stops)]


def category(index: int) -> tuple[str, str, str]:
    """Colour, dash and marker of the index-th series.

    Raises: ValueError beyond seven, where neither cue can be told apart any more.
    """
    if not 0 <= index < len(OKABE_ITO):
        raise ValueError(f"expected at most {len(OKABE_ITO)} series in one figure, found index {index}")
    return OKABE_ITO[index], DASHES[index], MARKERS[index]


def colour_at(value: float | int, stops: tuple[str, ...] = CIVIDIS) -> str:
    """The colour of a value in [0, 1] on a scale, as #rrggbb; values outside are clipped."""
    position = min(max(value, 0.0), 1.0) * (len(stops) - 1)
    low = min(int(position), len(stops) - 2)
    mix = position - low
    pairs = zip(_rgb(stops[low]), _rgb(stops[low + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * mix):02x}" for a, b in pairs)


def contrast(colour: str, other: str) -> float:
    """Contrast ratio of two #rrggbb colours by WCAG 2: 1 (none) to 21 (black on white)."""
    bright, dark = sorted((_luminance(colour), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def ink(background: str) -> str:
    """Black or white, whichever reads better on the background; at least 4.5 : 1 on any colour."""
    return max(("#000000", "#ffffff"), key=lambda colour: contrast(colour, background))


def symmetric_limit(values: object) -> float:
    """Half-width of the colour range of signed values, so that 0 has the middle colour; 1 when all are 0."""
    import numpy as np

    largest = float(np.nanmax(np.abs(np.asarray(values, dtype=np.float64)), initial=0.0))
    return largest or 1.0


def apply_style(figure: go.Figure, *, title: str = "", theme: Theme = "light", height: int = 420) -> go.Figure:
    """Give a figure the project's layout; returns the same figure."""
    figure.update_layout(template=template(theme), title={"text": title}, height=height)
    return figure


def template(theme: Theme = "light") -> go.layout.Template:
    """The Plotly template of a theme: fonts, margins, axes, colours of series and of scales."""
    import plotly.graph_objects as go

    page = _PAGE[theme]
    axis = {
        "gridcolor": page["grid"], "linecolor": page["muted"], "zerolinecolor": page["muted"], "ticks": "outside",
        "tickcolor": page["muted"], "automargin": True, "title": {"standoff": 8},
    }  # fmt: skip
    layout = {
        "font": {"family": FONT, "size": 13, "color": page["text"]},
        "title": {"x": 0.0, "xref": "paper", "font": {"size": 15}},
        "paper_bgcolor": page["paper"], "plot_bgcolor": page["plot"], "colorway": list(OKABE_ITO),
        "margin": {"l": 64, "r": 24, "t": 56, "b": 56}, "xaxis": axis, "yaxis": axis,
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"},
        "hoverlabel": {"font": {"family": FONT}},
        "colorscale": {"sequential": scale(), "sequentialminus": scale(), "diverging": scale("blue_orange")},
    }  # fmt: skip
    return go.layout.Template(layout=layout)


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


def _luminance(colour: str) -> float:
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in _rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
