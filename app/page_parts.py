"""What every page shows in the same way: errors in one line, where a number comes from, exports, the model's card."""

from __future__ import annotations

import json
import textwrap
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import loaders
import streamlit as st

from engram_interp.models.registry import BUNDLED
from engram_interp.runs import Provenance

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_EXPECTED = (ValueError, KeyError, IndexError, ArithmeticError, OSError, NotImplementedError, RuntimeError, MemoryError)
SMALL = "Small model trained for this project: what you see describes this checkpoint, not the published models."


@contextmanager
def readable_errors() -> Iterator[None]:
    """Show what goes wrong inside as one line, with the trace folded away; the rest of the page stays usable."""
    try:
        yield
    except _EXPECTED as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        st.error(" ".join(str(message).split()) or type(error).__name__, icon=":material/error:")
        with st.expander("Details for a report"):
            st.code(traceback.format_exc(), language=None)


def provenance_line(provenance: Provenance, *more: str) -> None:
    """Model, weights, commit and what else matters, in small print."""
    st.caption(provenance_text(provenance, *more))


def provenance_text(provenance: Provenance, *more: str) -> str:
    """`mini-engram 3f2a1c9b · commit ab12 · ...`."""
    models = [f"{name} {weights[:12]}" for name, weights in provenance.models.items()]
    return " · ".join([*models, f"commit {provenance.commit or 'none (installed package)'}", *more])


def model_card(name: str) -> None:
    """What the chosen model is."""
    config = loaders.config(name)
    if config is None:
        st.caption("A model of another kind, opened by an adapter.")
        return
    memory = "no memory"
    if config.engram:
        orders = len(config.engram.rows_per_head)
        blocks = ", ".join(map(str, config.engram.blocks))
        memory = f"Engram in blocks {blocks}: {orders} orders × {config.engram.heads} heads"
    st.caption(
        f"{config.layers} blocks · width {config.width} · {config.streams} branches · {config.routed_experts} experts "
        "· "
        f"{memory} · context {config.context}"
    )
    if name in BUNDLED:
        st.caption(SMALL)


def no_models() -> None:
    """The page without any model."""
    st.title("No model to look at")
    st.info(
        "No bundled model was found in this installation. Start the dashboard with a directory that holds one:\n\n"
        "`engram-interp app --model DIRECTORY`"
    )


def without_memory(name: str, question: str) -> None:
    """The page of a question about the memory, for a model that has none."""
    st.info(
        f"{name} has no Engram memory, so there is no answer to: {question} Choose another model on the left, or look "
        "at:"
    )
    st.page_link("views/lens.py", label="Lens: how early is the answer readable?", icon=":material/arrow_forward:")


def exports(name: str, key: str, **forms: Callable[[], str | bytes]) -> None:
    """A row of download buttons; each file is made when its button is clicked."""
    kinds = {
        "csv": "text/csv",
        "json": "application/json",
        "html": "text/html",
        "svg": "image/svg+xml",
        "png": "image/png",
    }
    with st.container(horizontal=True):
        for suffix, make in forms.items():
            st.download_button(
                suffix.upper(), data=make, file_name=f"{name}.{suffix}", mime=kinds[suffix], key=f"{key}_{suffix}",
                on_click="ignore", icon=":material/download:",
            )  # fmt: skip


def as_json(value: dict) -> str:
    """A result as JSON; what is not finite has been made null by the library."""
    return json.dumps(value, ensure_ascii=False)


def figure(plot: go.Figure, key: str, alt: str = "") -> None:
    """A Plotly figure that fits its column; the camera on it saves a PNG made by the browser."""
    options = {"displaylogo": False, "toImageButtonOptions": {"format": "png", "scale": 2, "filename": key}}
    lines = textwrap.wrap(plot.layout.title.text or "", 44)  # what fits a telephone: Plotly cuts a longer line off
    plot.update_layout(template=None, margin_t=24 + 20 * len(lines), title_text="<br>".join(lines))
    st.plotly_chart(plot, key=f"figure_{key}", config=options, alt=alt or None)


def table(frame: pd.DataFrame, key: str, height: int | str = "auto") -> None:
    """A table without its index."""
    st.dataframe(frame, hide_index=True, key=f"table_{key}", height=height)


def lens_choices(models: list, results: list, at: int) -> pd.DataFrame:
    """First choice, KL and entropy (nats) of every layer of every model after one token."""
    import pandas as pd

    from engram_interp.figures.gatemap import show
    from engram_interp.models.text import show_tokens

    columns: dict[str, object] = {"layer": list(range(results[0].sites))}
    for model, result in zip(models, results, strict=True):
        columns[result.model] = [show(t) for t in show_tokens(model.tokenizer, result.top1[:, at].tolist())]
        columns[f"KL, {result.model}"] = result.kl[:, at].round(3)
        columns[f"entropy, {result.model}"] = result.entropy[:, at].round(3)
    return pd.DataFrame(columns)
