"""A text coloured by its gates: in a terminal, and as a page that needs nothing else."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from engram_interp.figures.gatemap import row_labels, show
from engram_interp.runs import Provenance

if TYPE_CHECKING:
    from rich.text import Text

# Nine equally spaced stops of cividis (Nuñez, Anderton, Renslow 2018): lightness rises evenly, safe for colour blindness.
_CIVIDIS = ("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#fee838")


def cividis(value: float) -> tuple[int, int, int]:
    """The colour of a value in [0, 1]."""
    position = min(max(value, 0.0), 1.0) * (len(_CIVIDIS) - 1)
    low = min(int(position), len(_CIVIDIS) - 2)
    mix = position - low
    first, second = (tuple(bytes.fromhex(_CIVIDIS[i][1:])) for i in (low, low + 1))
    return tuple(round(a + (b - a) * mix) for a, b in zip(first, second, strict=True))  # type: ignore[return-value]


def ink(colour: tuple[int, int, int]) -> str:
    """Black or white, whichever reads on the colour (contrast at least 4.5 : 1)."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def terminal_strips(
    tokens: Sequence[str], layers: Sequence[int], gates: Float[np.ndarray, "T E M"], *, colour: bool = True
) -> list[tuple[str, Text]]:
    """A line of text per layer and branch: every gate, none selected.

    Args: colour: background by gate; without it (a file, a pipe) every token carries its number.
    """
    flat = gates.reshape(len(tokens), -1)
    line = _coloured if colour else _numbered
    return [(label, line(tokens, flat[:, row])) for row, label in enumerate(row_labels(layers, gates.shape[2]))]


def _coloured(tokens: Sequence[str], gates: Float[np.ndarray, " T"]) -> Text:
    from rich.text import Text

    line = Text()
    for token, gate in zip(tokens, gates, strict=True):
        colour = cividis(float(gate))
        line.append(show(token), style=f"{ink(colour)} on rgb({colour[0]},{colour[1]},{colour[2]})")
    return line


def _numbered(tokens: Sequence[str], gates: Float[np.ndarray, " T"]) -> Text:
    from rich.text import Text

    return Text(" ".join(f"{show(token)} {gate:.2f}" for token, gate in zip(tokens, gates, strict=True)))


def strip_html(tokens: Sequence[str], gates: Float[np.ndarray, " T"]) -> str:
    """One strip as inert HTML: a coloured span per token with its number in the title."""
    spans = []
    for position, (token, gate) in enumerate(zip(tokens, gates, strict=True)):
        colour = cividis(float(gate))
        style = f"background:rgb{colour};color:{ink(colour)}"
        title = html.escape(f"token {position} {show(token)}: gate {gate:.3f}", quote=True)
        spans.append(f'<span style="{style}" title="{title}">{html.escape(show(token))}</span>')
    return "<div class=strip>" + "<wbr>".join(spans) + "</div>"


def strip_page(
    tokens: Sequence[str],
    layers: Sequence[int],
    gates: Float[np.ndarray, "T E M"],
    model: str,
    provenance: Provenance,
) -> str:
    """A self-contained page: a strip per layer and branch, a scale, and where the numbers come from."""
    flat = gates.reshape(len(tokens), -1)
    strips = "".join(
        f"<h2>{html.escape(label)}</h2>{strip_html(tokens, flat[:, row])}"
        for row, label in enumerate(row_labels(layers, gates.shape[2]))
    )
    scale = "".join(f'<span style="background:rgb{cividis(i / 40)}">&nbsp;</span>' for i in range(41))
    source = html.escape(json.dumps(provenance.as_dict(), indent=1))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>Gates of {html.escape(model)}</title>"
        "<style>body{font:16px/1.6 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "h2{font-size:.9rem;margin:1.2rem 0 .3rem}.strip{font-family:ui-monospace,monospace;line-height:1.9}"
        ".strip span{padding:.15rem 0}pre{font-size:.75rem;white-space:pre-wrap}</style>"
        f"<h1>When does the memory of {html.escape(model)} speak?</h1>"
        "<p>The background of a token is its gate; hover for the number. 0.5 means no evidence, not half open.</p>"
        f"<p>0 {scale} 1</p>{strips}<details><summary>Provenance</summary><pre>{source}</pre></details></html>"
    )
