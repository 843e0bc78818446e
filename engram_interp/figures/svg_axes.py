"""Where does a value lie on a static picture? The axes, ticks and legend of `figures.static_svg`.

Text and lines take the colour of the page (`currentColor`), so that one picture serves light, dark and paper. Widths of
text are estimates (0.56 of the font size a character), which only decides about wrapping and slanting.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

FONT = 12.0
_CHARACTER = 0.56 * FONT
TITLE, RIGHT, GAP = 28.0, 12.0, 8.0


def text_width(text: str) -> float:
    """Estimated width in pixels."""
    return len(text) * _CHARACTER


def text(x: float | int, y: float | int, words: object, *, anchor: str = "start", extra: str = "") -> str:
    """One line of text."""
    anchored = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{anchored}{extra}>{html.escape(str(words))}</text>'


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers in [low, high]."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [float(round(step * k, 12)) for k in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Axis:
    """One direction: numbers from `low` to `high`, or categories at 0, 1, ...; `ticks` are (position, label)."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    categories: tuple[str, ...] = ()
    title: str = ""

    def number(self, value: Any) -> float:
        """A value as a number: categories become their index."""
        return float(self.categories.index(str(value))) if self.categories else float(value)


def make_axis(layout: Any, values: Iterable[Any], *, padding: float, cells: bool) -> Axis:
    """The axis of a Plotly layout over the values drawn on it.

    Args: padding: share of the range left free at both ends; cells: values are the middles of cells one unit wide.
    """
    drawn = list(values)
    title = layout.title.text or ""
    if any(isinstance(v, str) for v in drawn):
        categories = tuple(dict.fromkeys(str(v) for v in drawn))
        ticks = tuple((float(i), name) for i, name in enumerate(categories))
        return Axis(-0.5, len(categories) - 0.5, ticks, categories, title)
    numbers = [float(v) for v in drawn if v is not None and math.isfinite(float(v))] or [0.0, 1.0]
    low, high = min(numbers), max(numbers)
    if layout.rangemode == "tozero":
        low, high = min(low, 0.0), max(high, 0.0)
    spread = (high - low) or 1.0
    free = 0.5 if cells else padding * spread
    # A zero at an end is a floor, not a value that needs room beside it.
    low, high = low - (free if cells or low != 0 else 0), high + (free if cells or high != 0 else 0)
    if layout.range is not None:
        low, high = map(float, layout.range)
    if layout.tickvals is not None:
        ticks = tuple((float(v), str(t)) for v, t in zip(layout.tickvals, layout.ticktext, strict=True))
    elif cells or (all(v == int(v) for v in numbers) and spread <= 12):
        ticks = tuple((float(v), f"{v:g}") for v in sorted(set(numbers)) if low <= v <= high)
    else:
        ticks = tuple((v, f"{v:g}") for v in round_ticks(low, high))
    return Axis(low, high, ticks, (), title)


@dataclass(frozen=True)
class Frame:
    """The rectangle between the axes, in pixels; y grows upwards in values and downwards in pixels."""

    x_axis: Axis
    y_axis: Axis
    left: float
    top: float
    right: float
    bottom: float
    slant: bool
    grid: bool

    def x(self, value: Any, shift: float = 0.0) -> float:
        """Pixels of a value; `shift` in units of the axis."""
        axis = self.x_axis
        share = (axis.number(value) + shift - axis.low) / (axis.high - axis.low)
        return self.left + share * (self.right - self.left)

    def y(self, value: Any) -> float:
        """Pixels of a value."""
        axis = self.y_axis
        return self.bottom - (axis.number(value) - axis.low) / (axis.high - axis.low) * (self.bottom - self.top)

    def draw(self) -> list[str]:
        """Grid, ticks and titles."""
        parts = []
        for value, label in self.y_axis.ticks:
            y = self.y(value) if not self.y_axis.categories else self.y(self.y_axis.categories[int(value)])
            if self.grid:
                parts.append(f'<path class="g" d="M{self.left:.1f} {y:.1f}H{self.right:.1f}"/>')
            parts.append(text(self.left - 6, y + 4, label, anchor="end"))
        for value, label in self.x_axis.ticks:
            x = self.x(self.x_axis.categories[int(value)]) if self.x_axis.categories else self.x(value)
            y = self.bottom + FONT + 4
            if self.slant:
                parts.append(
                    text(x + 4, y, label, anchor="end", extra=f' transform="rotate(-45 {x + 4:.1f} {y - 4:.1f})"')
                )
            else:
                parts.append(text(x, y, label, anchor="middle"))
        parts.append(f'<path class="a" d="M{self.left:.1f} {self.top:.1f}V{self.bottom:.1f}H{self.right:.1f}"/>')
        if self.x_axis.title:
            y = self.bottom + label_room(self.x_axis, self.slant) + FONT
            parts.append(text((self.left + self.right) / 2, y, self.x_axis.title, anchor="middle"))
        if self.y_axis.title:
            parts.append(text(4, self.top - GAP - 6, self.y_axis.title))  # level, above the axis: no turned head
        return parts

    def below(self) -> float:
        """Where the space under the axis and its title begins."""
        return self.bottom + label_room(self.x_axis, self.slant) + (FONT + 10 if self.x_axis.title else 0) + GAP


def label_room(axis: Axis, slant: bool) -> float:
    """Height of the labels under an axis."""
    longest = max((text_width(label) for _, label in axis.ticks), default=0.0)
    return GAP + FONT + (longest * 0.71 if slant else 4)


def make_frame(
    x_axis: Axis, y_axis: Axis, width: int, plot_height: float | int, *, right: float = RIGHT, grid: bool = True
) -> Frame:
    """Put the axes onto a picture of a width."""
    left = 12.0 + max((text_width(label) for _, label in y_axis.ticks), default=0.0)
    top = TITLE + (FONT + GAP + 6 if y_axis.title else 0)
    between = (width - left - right) / max(1, len(x_axis.ticks))
    slant = any(text_width(label) > between - 4 for _, label in x_axis.ticks)
    if slant:  # the first label leans out to the left
        left = max(left, text_width(x_axis.ticks[0][1]) * 0.71 - between / 2 + 4)
    return Frame(x_axis, y_axis, left, top, width - right, top + plot_height, slant, grid)


def legend(entries: Sequence[tuple[str, str]], y: float, width: int) -> tuple[list[str], float]:
    """Names beside their marks (`entries`: mark drawn in a box of 24 x 12, name), wrapped; gives the parts and the end."""
    parts, x = [], 4.0
    for mark, name in entries:
        wanted = 30 + text_width(name) + 14
        if x + wanted > width and x > 4:
            x, y = 4.0, y + 18
        parts.append(f'<g transform="translate({x:.1f} {y:.1f})">{mark}{text(30, 10, name)}</g>')
        x += wanted
    return parts, y + (20 if entries else 0)
