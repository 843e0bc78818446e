"""What does the user look at? Read once from widgets and the address bar into a frozen `View`; pages take it and
nothing else.

Widgets bound with `bind="query-params"` keep themselves in the address; the text (which may be long), the pinned text
and the chosen token are put there by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import loaders
import streamlit as st
import texts

from engram_interp.models.protocol import Decoder
from engram_interp.probes.token_readings import Quantity

DEFAULT_TEXT = "Only Alexander the Great could tame the horse Bucephalus. By the way, the Princess of Wales agreed."
QUANTITIES: tuple[Quantity, ...] = ("gate", "score", "write", "effect")
WINDOW = 512  # tokens shown at once
_COLOURS = """
- gate: from 0 to 1; 0.5 is a score of 0, no evidence
- score: what the gate is made from; 0 is no evidence
- write: size of what the memory adds, beside the stream it adds to
- effect: how much more probable the next token is with the memory, nats
"""
_OWN_WORDS = "your own text"


@dataclass(frozen=True)
class View:
    """One picture of one text. `token` is None where nothing was chosen yet; `page` counts windows from 0."""

    model: str
    text: str
    quantity: Quantity
    layer: int
    branch: int | Literal["mean", "max"]
    token: int | None
    page: int
    pinned: str | None


def text_input(page: str) -> str:
    """The text box with its gallery; the text survives a change of page and is in the address."""
    state = st.session_state
    if "text" not in state:
        state["text"] = _from_address("text", "t") or DEFAULT_TEXT
        state["pinned"] = _from_address("pin", "p")
    if "text_box" not in state or state.get("text_page") != page:  # a widget's value does not survive a change of page
        state["text_box"], state["text_page"] = state["text"], page
    left, right = st.columns([1, 3], vertical_alignment="top")
    with left:
        st.selectbox("Example", [_OWN_WORDS, *loaders.gallery_texts()], key="example", on_change=_use_example)
    with right:
        st.text_area("Text", key="text_box", height=100, placeholder="Type or paste a text")
    text = state["text"] = state["text_box"]
    _to_address("text", "t", text if text != DEFAULT_TEXT else None)
    _to_address("pin", "p", state.get("pinned"))
    return text


def gates_view(model: str, text: str, layers: tuple[int, ...], branches: int, tokens: int) -> View:
    """The controls of the Gates page.

    Args: layers, branches: of the model; tokens: of the text.
    """
    state = st.session_state
    take_selection("strip")
    with st.container(horizontal=True, gap="medium"):
        names = [str(layer) for layer in layers]
        forget_unless("layer", names)
        st.segmented_control("Engram layer", names, default=names[0], required=True, key="layer", bind="query-params")
        names = ["mean", "max", *map(str, range(branches))]
        forget_unless("branch", names)
        st.segmented_control("Branch", names, default="mean", required=True, key="branch", bind="query-params")
        st.segmented_control(
            "Colour by", QUANTITIES, default="gate", required=True, key="by", bind="query-params", help=_COLOURS
        )  # fmt: skip
    pages = -(-tokens // WINDOW)
    page = 0
    if pages > 1:
        st.caption(f"{tokens} tokens, shown {WINDOW} at a time")
        page = st.pagination(pages, key="window", bind="query-params") - 1
    branch = state["branch"]
    return View(
        model=model,
        text=text,
        quantity=state["by"],
        layer=int(state["layer"]),
        branch=branch if branch in ("mean", "max") else int(branch),
        token=_chosen_token(text, tokens),
        page=page,
        pinned=state.get("pinned"),
    )


def token_in(strip: str, text: str, tokens: int) -> int | None:
    """The token chosen in a strip, None where none was."""
    take_selection(strip)
    return _chosen_token(text, tokens)


def cut(model: Decoder, text: str, tokens: int) -> str:
    """The beginning of a text that has so many tokens."""
    offsets = model.tokenizer.encode(text, add_special_tokens=False).offsets
    return text if len(offsets) <= tokens else text[: offsets[tokens - 1][1]]


def take_selection(strip: str) -> None:
    """A token or a cell was clicked in a strip: choose the token and its block, before the controls."""
    state = st.session_state
    chosen = (state.get(strip) or {}).get("selected")
    if not chosen or chosen == state.get("taken"):
        return
    state["taken"] = dict(chosen)
    state["token"], state["token_of"] = int(chosen["token"]), state["text_box"]
    if chosen.get("layer", -1) >= 0:
        state["layer"] = str(chosen["layer"])


def pin() -> None:
    """Keep the current text as A."""
    st.session_state["pinned"] = st.session_state["text_box"]


def unpin() -> None:
    """Forget the text A."""
    st.session_state["pinned"] = None


def share_token(token: int, default: int) -> None:
    """Put the chosen token into the address, unless it is the one chosen without asking."""
    _set("token", None if token == default else str(token))


def forget_unless(key: str, options: list[str]) -> None:
    """Another model may not have the layer or branch chosen before."""
    if key in st.session_state and st.session_state[key] not in options:
        del st.session_state[key]


def forget_choices(key: str, options: list[str]) -> None:
    """A filter or a restart may have taken some of several choices away."""
    if key in st.session_state:
        st.session_state[key] = [choice for choice in st.session_state[key] if choice in options]


def _use_example() -> None:
    if st.session_state["example"] != _OWN_WORDS:
        st.session_state["text_box"] = st.session_state["example"]


def _chosen_token(text: str, tokens: int) -> int | None:
    state = st.session_state
    if "token_of" not in state:
        named = st.query_params.get("token", "")
        if named.isascii() and named.isdigit():
            state["token"], state["token_of"] = int(named), text
    if state.get("token_of") != text or not 0 <= state.get("token", -1) < tokens:
        return None
    return state["token"]


def _from_address(short: str, stored: str) -> str | None:
    name = st.query_params.get(stored)
    return st.query_params.get(short) or (texts.recall(name) if name else None)


def _to_address(short: str, stored: str, text: str | None) -> None:
    fits = not text or texts.fits_address(text)
    _set(short, text if fits else None)
    _set(stored, None if fits or not text else texts.remember(text))


def _set(key: str, value: str | None) -> None:
    if not value:
        if key in st.query_params:
            del st.query_params[key]
    elif st.query_params.get(key) != value:
        st.query_params[key] = value
