"""Gates: when does the memory speak?"""

from __future__ import annotations

import time

import inspector
import loaders
import page_parts
import state
import streamlit as st
from gate_strip import gate_strip

from engram_interp.figures.token_strip import describe, hover_texts, strip_data, strip_svg
from engram_interp.probes.gates import GateMap
from engram_interp.probes.token_memory import ngram_labels, slot_numbers
from engram_interp.probes.token_readings import LABELS, SIGNED, TokenReadings, difference, shared_range, token_readings

QUESTION = "When does the memory speak?"


def show() -> None:
    """The page."""
    st.title(QUESTION)
    name = st.session_state["model"]
    text = state.text_input(QUESTION)
    if not text.strip():
        st.info("Type a text above, or choose an example.")
        return
    with page_parts.readable_errors():
        model = loaders.model(name)
        if not getattr(model, "engram_layers", ()):
            page_parts.without_memory(name, QUESTION)
            return
        tokens = len(model.tokenizer.encode(text, add_special_tokens=False).ids)
        if tokens > loaders.MAX_TOKENS:
            too_long(model, text, tokens)
            return
        show_gates(name, text)


def show_gates(name: str, text: str) -> None:
    """Strip, inspector and exports of one text."""
    started = time.perf_counter()
    gates = loaders.gates(name, text)
    view = state.gates_view(name, text, gates.layers, gates.branches, len(gates.tokens))
    readings = read(view, gates)
    first = window_start(view, gates)
    peak = first + readings.peak
    token = peak if view.token is None or not first <= view.token < first + len(readings.tokens) else view.token
    state.share_token(token, peak)
    readings = compare(view, readings, token) if view.pinned else readings
    data = picture(view, gates, readings, first)
    caption = page_parts.provenance_text(gates.provenance, f"block {view.layer}", f"branch {view.branch}")
    strip(data, "strip", "B" if view.pinned else "", token, view.layer, caption)
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button("Pin this text as A", on_click=state.pin, icon=":material/push_pin:", disabled=view.pinned == text)
        if view.pinned:
            st.button("Unpin A", on_click=state.unpin, icon=":material/close:")
        page_parts.exports(
            "gates", "gates", svg=lambda: strip_svg(data, caption), csv=lambda: gates.table().to_csv(index=False),
            html=gates.html, json=lambda: page_parts.as_json(gates.as_dict()),
        )  # fmt: skip
    page_parts.provenance_line(
        gates.provenance, f"{len(gates.tokens)} tokens", f"{time.perf_counter() - started:.2f} s"
    )
    inspector.show(view, gates, token, (first, first + len(readings.tokens)))


def window_start(view: state.View, gates: GateMap) -> int:
    """Position of the first token shown."""
    return min(view.page * state.WINDOW, len(gates.tokens) - 1)


def read(view: state.View, gates: GateMap, text: str | None = None) -> TokenReadings:
    """The numbers to draw, for the window shown."""
    first = window_start(view, gates)
    stop = min(first + state.WINDOW, len(gates.tokens))
    if view.quantity != "effect":
        return token_readings(gates, view.quantity, layer=view.layer, branch=view.branch).window(first, stop)
    sets = (None, *((layer,) for layer in gates.layers)) if len(gates.layers) > 1 else (None,)
    effects = [loaders.effects(view.model, text or view.text, (first, stop), blocks) for blocks in sets]
    return token_readings(gates, "effect", layer=view.layer, effects=effects)


def compare(view: state.View, readings: TokenReadings, token: int) -> TokenReadings:
    """Show the pinned text above on the range of both, and the difference where the texts share their tokens."""
    pinned = loaders.gates(view.model, view.pinned)
    first = window_start(view, pinned)
    before = read(view, pinned, view.pinned)
    before, after = shared_range(before, readings)
    caption = page_parts.provenance_text(pinned.provenance, f"block {view.layer}")
    strip(
        picture(view, pinned, before, first, view.pinned),
        "strip_a",
        "A (pinned)",
        before.peak + first,
        view.layer,
        caption,
    )
    gap = difference(before, after)
    if gap is None:
        st.caption("A and B share fewer than half of their tokens, so they stand side by side without a difference.")
    else:
        data = strip_data(
            gap.tokens, gap.shown, gap.bars, gap.grid, gap.labels, low=gap.low, high=gap.high, signed=True,
            unit=f"B − A: {LABELS[gap.quantity]}, {len(gap.tokens)} shared tokens", blocks=gap.blocks,
        )  # fmt: skip
        strip(data, "strip_difference", "Difference", gap.peak, view.layer, caption)
    return after


def picture(
    view: state.View, gates: GateMap, readings: TokenReadings, first: int, text: str | None = None
) -> dict[str, object]:
    """What the strip draws; `text` where it is not the view's."""
    model, layer = loaders.model(view.model), gates.layers.index(view.layer)
    part = slice(first, first + len(readings.tokens))
    effects = loaders.effects(view.model, text or view.text, (part.start, part.stop))
    ids = gates.token_ids[: part.stop]
    hover = hover_texts(
        readings.tokens,
        ngram_labels(model, ids, block=view.layer, first=first),
        slot_numbers(model, ids, block=view.layer)[first:],
        gates.gates[part, layer],
        gates.scores[part, layer],
        gates.write_norm[part, layer] / gates.hidden_norm[part, layer],
        effects.change,
        layer=view.layer,
        first=first,
    )
    return strip_data(
        readings.tokens, readings.shown, readings.bars, readings.grid, readings.labels, low=readings.low,
        high=readings.high, unit=LABELS[view.quantity], hover=hover, blocks=readings.blocks, first=first,
        signed=view.quantity in SIGNED, middle="no evidence" if view.quantity in ("gate", "score") else "",
    )  # fmt: skip


def strip(data: dict, key: str, title: str, selected: int, layer: int, caption: str) -> None:
    """One strip; `state.take_selection` reads the clicks of the one with the key "strip"."""
    gate_strip(data, key=key, title=title, alt=describe(data), caption=caption, selected=selected, layer=layer)


def too_long(model, text: str, tokens: int) -> None:  # noqa: ANN001
    """A text beyond the limit, with a way on."""
    st.warning(f"This text has {tokens} tokens; at most {loaders.MAX_TOKENS} can be shown.")

    def shorten() -> None:
        st.session_state["text_box"] = state.cut(model, text, state.WINDOW)

    st.button(f"Use the first {state.WINDOW} tokens", on_click=shorten)


show()
