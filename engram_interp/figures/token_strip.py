"""A text with a coloured background per token, bars per branch and a grid of rows: plain data for a page, and SVG.

`strip_data` is what an interactive strip draws (numbers, labels, colour scale); `strip_svg` is the same picture as a
file for a paper, made here and not by a browser. Colours: cividis, or blue-orange for signed values; bars repeat the
branches so that colour is never the only cue. Cost: microseconds per token. Misleads where a glyph is wider than the
SVG assumes: the file asks the viewer to fit each token to its box (`textLength`).
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int64

from engram_interp.figures.gatemap import show
from engram_interp.figures.style import BLUE_ORANGE, CIVIDIS, colour_at, ink

_CHARACTER, _BOX, _BARS, _CELL = 9.0, 22.0, 14.0, 16.0
_SEPARATOR = " | "  # between the compressed tokens of an n-gram
_MISSING = "#d0d0d0"


def strip_data(
    tokens: Sequence[str],
    shown: Float[np.ndarray, " T"],
    bars: Float[np.ndarray, "T M"],
    grid: Float[np.ndarray, "rows T"],
    labels: Sequence[str],
    *,
    low: float,
    high: float,
    unit: str,
    hover: Sequence[str] | None = None,
    blocks: Sequence[int] = (),
    first: int = 0,
    signed: bool = False,
    middle: str = "",
) -> dict[str, object]:
    """Plain data of one strip; NaN becomes None.

    Args: bars: heights in [0, 1]; low, high: range of the colours; first: position of the first token in its text;
        middle: what the middle of the scale means ("no evidence").
    Raises: ValueError for lengths that do not fit.
    """
    sizes = {
        "shown": len(shown),
        "bars": len(bars),
        "grid": grid.shape[1],
        "hover": len(hover) if hover is not None else len(tokens),
    }
    if wrong := {name: size for name, size in sizes.items() if size != len(tokens)}:
        raise ValueError(f"expected one entry per token ({len(tokens)}), found {wrong}")
    if grid.shape[0] != len(labels):
        raise ValueError(f"expected a label per row ({grid.shape[0]}), found {len(labels)}")
    return {
        "tokens": [show(token) for token in tokens],
        "breaks": ["\n" in token for token in tokens],
        "shown": _plain(shown),
        "bars": np.clip(np.nan_to_num(bars), 0, 1).round(3).tolist(),
        "grid": [_plain(row) for row in grid],
        "labels": list(labels),
        "blocks": list(blocks),
        "hover": list(hover) if hover is not None else [show(token) for token in tokens],
        "first": first,
        "scale": {
            "low": low, "high": high, "unit": unit, "middle": middle,
            "stops": list(BLUE_ORANGE if signed else CIVIDIS),
        },
    }  # fmt: skip


def hover_texts(
    tokens: Sequence[str],
    ngrams: Sequence[Sequence[str]],
    slots: Int64[np.ndarray, "T S"],
    gates: Float[np.ndarray, "T M"],
    scores: Float[np.ndarray, "T M"],
    write: Float[np.ndarray, " T"],
    change: Float[np.ndarray, " T"] | None = None,
    *,
    layer: int,
    first: int = 0,
) -> list[str]:
    """What a token says when the pointer rests on it: n-grams, slots, gate and score per branch, write, effect."""
    texts = []
    heads = slots.shape[1] // max(1, len(ngrams[0]) if ngrams else 1)
    for t, token in enumerate(tokens):
        lines = [f"token {first + t} {show(token)}"]
        for n, ngram in enumerate(ngrams[t]):
            numbers = " ".join(map(str, slots[t, n * heads : (n + 1) * heads]))
            parts = ngram.split(_SEPARATOR)
            lines.append(f"{len(parts)}-gram {_SEPARATOR.join(map(show, parts))}: slots {numbers}")
        lines.append(f"block {layer}, gate by branch: {_numbers(gates[t])}")
        lines.append(f"score by branch: {_numbers(scores[t])}")
        lines.append(f"write / stream: {write[t]:.3f}")
        if change is not None:
            lines.append(
                "no next token"
                if np.isnan(change[t])
                else f"log p of the next token, all memories: {change[t]:+.3f} nats"
            )
        texts.append("\n".join(lines))
    return texts


def _numbers(values: Float[np.ndarray, " M"]) -> str:
    return "  ".join(f"{value:.2f}" for value in values)


def _plain(values: Float[np.ndarray, " T"]) -> list[float | None]:
    return [round(float(v), 5) if np.isfinite(v) else None for v in values]


def describe(data: dict) -> str:
    """One sentence for a reader who does not see the picture: where the shown value is largest."""
    known = [(abs(v), t) for t, v in enumerate(data["shown"]) if v is not None]
    if not known:
        return "no values"
    _, t = max(known)
    unit, token = data["scale"]["unit"], f"{data['first'] + t} {data['tokens'][t]}"
    return f"{unit} is largest in size at token {token}: {data['shown'][t]:+.3f}"


def strip_svg(data: dict, caption: str, *, width: int = 1000) -> str:
    """The strip, its bars and its grid as one SVG; token text is escaped and inert.

    Args: data: from `strip_data`; caption: printed below (model, weights, commit).
    """
    parts, y = _strip_parts(data, width)
    grid, y = _grid_parts(data, width, y + 14)
    scale, y = _scale_parts(data, y + 18, beside=width >= 500)
    lines = [caption[i : i + 130] for i in range(0, len(caption), 130)]
    text = [
        f'<text x="10" y="{y + 18 + 15 * n:.1f}" font-size="11">{html.escape(line)}</text>'
        for n, line in enumerate(lines)
    ]
    height = y + 30 + 15 * len(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:.0f}" '
        f'viewBox="0 0 {width} {height:.0f}" '
        f'class="strip" role="img" aria-label="{html.escape(describe(data), quote=True)}">'
        '<style>.strip text{font-family:ui-monospace,"Liberation Mono",monospace;font-size:14px}.strip .l{font-size:11px}</style>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join([*parts, *grid, *scale, *text])}</svg>'
    )


def _position(value: float | None, scale: dict) -> float | None:
    if value is None:
        return None
    return (value - scale["low"]) / ((scale["high"] - scale["low"]) or 1.0)


def _colour(value: float | None, scale: dict) -> str:
    position = _position(value, scale)
    return _MISSING if position is None else colour_at(position, tuple(scale["stops"]))


def _columns(text: str) -> int:
    """Character cells a text takes: two for East Asian wide characters, none for combining marks."""
    return max(1, sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text))


def _strip_parts(data: dict, width: int) -> tuple[list[str], float]:
    parts, x, y = [], 10.0, 10.0
    for token, value, bars, ends in zip(data["tokens"], data["shown"], data["bars"], data["breaks"], strict=True):
        box = _columns(token) * _CHARACTER + 6
        if x + box > width - 10 and x > 10:
            x, y = 10.0, y + _BOX + _BARS + 8
        colour = _colour(value, data["scale"])
        parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{box - 1:.1f}" height="{_BOX}" rx="2" fill="{colour}"/>')
        parts.append(
            f'<text x="{x + 3:.1f}" y="{y + 16:.1f}" fill="{ink(colour)}" textLength="{box - 7:.1f}" '
            f'lengthAdjust="spacingAndGlyphs">{html.escape(token)}</text>'
        )
        step = (box - 1) / len(bars)
        for m, bar in enumerate(bars):
            height = _BARS * bar
            parts.append(
                f'<rect x="{x + m * step:.1f}" y="{y + _BOX + 1 + _BARS - height:.1f}" '
                f'width="{max(step - 1, 0.6):.1f}" '
                f'height="{height:.1f}" fill="#6b7077"/>'
            )
        x += box
        if ends:
            x, y = 10.0, y + _BOX + _BARS + 8
    return parts, y + _BOX + _BARS


def _grid_parts(data: dict, width: int, y: float) -> tuple[list[str], float]:
    left = 10 + max(len(label) for label in data["labels"]) * 6.8
    cell = (width - 10 - left) / max(1, len(data["tokens"]))
    parts = []
    for label, row in zip(data["labels"], data["grid"], strict=True):
        parts.append(f'<text class="l" x="10" y="{y + 12:.1f}">{html.escape(label)}</text>')
        for t, value in enumerate(row):
            colour = _colour(value, data["scale"])
            parts.append(
                f'<rect x="{left + t * cell:.1f}" y="{y:.1f}" width="{cell:.2f}" height="{_CELL - 1}" fill="{colour}">'
                f"<title>{html.escape(data['tokens'][t])} {'' if value is None else value}</title></rect>"
            )
        y += _CELL
    return parts, y


def _scale_parts(data: dict, y: float, *, beside: bool) -> tuple[list[str], float]:
    scale = data["scale"]
    ramp = [colour_at(i / 60, tuple(scale["stops"])) for i in range(61)]
    parts = [f'<rect x="{10 + 3 * i}" y="{y:.1f}" width="3.2" height="10" fill="{c}"/>' for i, c in enumerate(ramp)]
    middle = f", middle {(scale['low'] + scale['high']) / 2:g} {scale['middle']}" if scale["middle"] else ""
    text = f"{scale['unit']}: {scale['low']:.3g} to {scale['high']:.3g}{middle}"
    x, below = (205, 0) if beside else (10, 15)
    return [*parts, f'<text class="l" x="{x}" y="{y + 9 + below:.1f}">{html.escape(text)}</text>'], y + 12 + below
