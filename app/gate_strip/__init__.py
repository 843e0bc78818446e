"""The coloured text of the Gates page: a small element of our own, drawn by `strip.js` from plain data.

Streamlit has no element that shows text with a colour, bars and keyboard focus per token, and its heat maps return no
click. The element computes nothing: `engram_interp.figures.token_strip.strip_data` says what to draw.
"""

from __future__ import annotations

from pathlib import Path

import streamlit as st

_FOLDER = Path(__file__).parent
_ELEMENT = st.components.v2.component(
    "engram_gate_strip",
    html='<div class="gate-strip"></div>\n',
    css=(_FOLDER / "strip.css").read_text(encoding="utf-8"),
    js=(_FOLDER / "strip.js").read_text(encoding="utf-8"),
)


def gate_strip(
    data: dict[str, object],
    *,
    key: str,
    title: str,
    alt: str,
    caption: str,
    selected: int,
    layer: int,
    bars_show: str = "the gates of the branches",
) -> None:
    """Show a strip; a click or a key puts `{"token": position, "layer": block or -1, "when": milliseconds}` into
    `st.session_state[key].selected`.

    Args: title: before the legend; alt: one sentence that states the finding; caption: printed below a saved picture;
        selected, layer: what is marked; bars_show: what the bars below the tokens are.
    """
    shown = {
        **data, "title": title, "alt": alt, "caption": caption, "selected": selected, "layer": layer, "file": key,
        "bars_show": bars_show,
    }  # fmt: skip
    _ELEMENT(key=key, data=shown, on_selected_change=lambda: None)
