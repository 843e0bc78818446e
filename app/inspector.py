"""The lower half of the Gates page: one token, seen from four sides."""

from __future__ import annotations

import loaders
import page_parts
import pandas as pd
import streamlit as st
from state import View

from engram_interp.figures.gatemap import show as visible
from engram_interp.probes.gates import GateMap
from engram_interp.probes.token_effects import TokenEffects
from engram_interp.probes.token_memory import TokenMemory, token_memory


def show(view: View, gates: GateMap, token: int, window: tuple[int, int]) -> None:
    """Tabs about the chosen token."""
    st.subheader(f"Token {token} · `{visible(gates.tokens[token]).replace('`', 'ˋ')}`", anchor=False)
    both, read, shared, numbers = st.tabs(["With and without memory", "Memory read", "Collisions", "Numbers"])
    with both, page_parts.readable_errors():
        _with_and_without(view, token, window)
    with page_parts.readable_errors():
        memory = _memory(view, token)
        with read:
            _memory_read(view, gates, memory)
        with shared:
            _collisions(memory)
    with numbers:
        _numbers(view, gates, token)


def predictions(effects: TokenEffects, token: int) -> None:
    """The next token after one position, with the memory and without it."""
    at = token - effects.first
    if effects.following[at]:
        columns = st.columns(4)
        columns[0].metric("Next token", visible(effects.following[at]))
        columns[1].metric("log p with − without", f"{effects.change[at]:+.2f} nats", help="Positive: the memory helps.")
        columns[2].metric("Its rank with → without", f"{effects.rank[0, at]} → {effects.rank[1, at]}")
        columns[3].metric("KL(with ‖ without)", f"{effects.kl[at]:.3f} nats")
    else:
        st.caption(f"The text ends here: no next token to judge. KL(with ‖ without) = {effects.kl[at]:.3f} nats")
    frame = effects.predictions(token)
    for column in ("with memory", "without memory"):
        frame[column] = [visible(text) for text in frame[column]]
    st.dataframe(
        frame,
        hide_index=True,
        key="predictions",
        column_config={
            name: st.column_config.ProgressColumn(name, min_value=0.0, max_value=1.0, format="%.3f")
            for name in ("p with", "p without")
        },
    )


def _with_and_without(view: View, token: int, window: tuple[int, int]) -> None:
    predictions(loaders.effects(view.model, view.text, window), token)
    st.caption(
        "Most probable next tokens, with the memory and with its write set to zero in every block. Setting every "
        "gate to 0 is the same thing: the gate multiplies the whole value, and the convolution has no bias. Later layers may "
        "repair a loss."
    )


def _memory(view: View, token: int) -> TokenMemory:
    model = loaders.model(view.model)
    weights = model.identity.weights_sha256
    counts = loaders.corpus_counts(model, weights, view.layer, tuple(loaders.gallery_texts()))
    norms = loaders.write_norms(view.model, view.text, view.layer)
    return token_memory(model, view.text, token, block=view.layer, corpus=counts, norms=norms)


def _memory_read(view: View, gates: GateMap, memory: TokenMemory) -> None:
    names = [f"{s} {visible(gates.tokens[s])}" for s in memory.sources]
    st.caption(
        f"Block {view.layer}: write |Y| = {memory.write_norm:.3f} onto a stream of |h| = {memory.hidden_norm:.3f}; "
        f"gated value |u| = {memory.gated_norm:.3f}, convolution |c| = {memory.conv_norm:.3f}, which reads tokens "
        f"{', '.join(names)} and is not scaled by the gate."
    )
    frame = memory.table()
    frame["n-gram"] = [visible(text) for text in frame["n-gram"]]
    page_parts.table(frame, "memory_read", height=320)


def _collisions(memory: TokenMemory) -> None:
    st.caption(
        f"{memory.shared} of {len(memory.rows)} rows are also read by other n-grams of the bundled gallery "
        f"({memory.corpus_tokens} tokens). A larger corpus would show more; the Memory page counts one of yours."
    )
    frame = memory.sharing()
    if len(frame):
        frame["other n-gram"] = [visible(text) for text in frame["other n-gram"]]
        page_parts.table(frame, "sharing")


def _numbers(view: View, gates: GateMap, token: int) -> None:
    rows = gates.table()
    rows = rows[rows["position"] == token].drop(columns=["position", "token"])
    page_parts.table(pd.DataFrame(rows), "numbers")
    st.caption("A gate of 0.5 is a score of 0: no evidence. Norms are over all branches together, in residual units.")
