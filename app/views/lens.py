"""Lens: how early is the answer readable?"""

from __future__ import annotations

import jobs
import loaders
import page_parts
import state
import streamlit as st

from engram_interp.figures.lens_map import lens_map
from engram_interp.figures.style import apply_style
from engram_interp.models.text import show_tokens
from engram_interp.models.watched import WatchedModel
from engram_interp.probes.lens import QUANTITIES, LensResult, logit_lens_kl
from engram_interp.probes.lens_comparison import LensComparison, compare_lens

QUESTION = "How early is the answer readable?"
SHOWN = ("kl", "entropy", "cross_entropy", "agreement")
CAPTION = (
    "Lower earlier: the final prediction formed earlier. Dashed lines: where an Engram writes. Middle layers need "
    "not speak the "
    "basis of the last one, so a lower KL can be a matter of dialect; the first layers are read least reliably. The "
    "last layer "
    "is the prediction itself, so its KL is exactly 0."
)


@st.cache_resource(max_entries=64, show_spinner="Reading every layer")
def read(_model, weights: str, texts: tuple[str, ...]) -> LensResult:  # noqa: ANN001
    """Lens readings, kept by weights and texts."""
    return logit_lens_kl(_model, list(texts))


def show() -> None:
    """The page."""
    st.title(QUESTION)
    first = st.session_state["model"]
    others = ["none", *loaders.partners(first)]
    text = state.text_input(QUESTION)
    with st.container(horizontal=True, gap="medium"):
        chosen = [name for name in ("mini-moe", "mini-engram", *others[1:]) if name in others]
        state.forget_unless("baseline", others)
        st.selectbox(
            "Compare with",
            others,
            index=others.index((chosen or ["none"])[0]),
            key="baseline",
            bind="query-params",
            width=260,
        )
        st.segmented_control(
            "Show",
            list(SHOWN),
            default="kl",
            required=True,
            key="show",
            bind="query-params",
            help="; ".join(QUANTITIES[q] for q in SHOWN),
        )
    if not text.strip():
        st.info("Type a text above, or choose an example.")
        return
    arms = [first] + ([st.session_state["baseline"]] if st.session_state["baseline"] != "none" else [])
    with page_parts.readable_errors():
        show_text(arms, text, st.session_state["show"])
    if len(arms) < 2:
        st.info("Choose a second model above to compare: one model alone cannot form its prediction early or late.")
        return
    st.subheader("Does one of them form its prediction earlier?", anchor=False)
    with page_parts.readable_errors():
        show_gallery(arms, st.session_state["show"])


def show_text(arms: list[str], text: str, quantity: str) -> None:
    """One text: a map for each model on one colour range, and the first choices after one token."""
    models = [loaders.model(name) for name in arms]
    results = [read(m, m.identity.weights_sha256, (text,)) for m in models]
    largest = max(float(r.values(quantity).max()) for r in results)
    for model, result in zip(models, results, strict=True):
        tokens = show_tokens(model.tokenizer, result.token_ids.tolist())
        choices = [show_tokens(model.tokenizer, row) for row in result.top1.tolist()]
        plot = lens_map(
            result.values(quantity), tokens, choices, title=result.model, unit=QUANTITIES[quantity], largest=largest,
            memories=getattr(model, "engram_layers", ()),
        )  # fmt: skip
        page_parts.figure(
            plot, f"lens_{result.model}", alt=f"{QUANTITIES[quantity]} of {result.model} by layer and token"
        )
        page_parts.provenance_line(result.provenance, f"{result.tokens} tokens")
    st.caption(CAPTION)
    tokens = show_tokens(models[0].tokenizer, results[0].token_ids.tolist())
    labels = [f"{t} {token}" for t, token in enumerate(tokens)]
    at = labels.index(
        st.selectbox("First choice of every layer after", labels, index=len(labels) - 1, key="lens_token")
    )
    page_parts.table(page_parts.lens_choices(models, results, at), "lens_choices")
    page_parts.exports(
        "lens", "lens_text", csv=lambda: results[0].table().to_csv(index=False),
        json=lambda: page_parts.as_json([r.as_dict() for r in results]), html=lambda: results[0].figure().to_html(),
    )  # fmt: skip


def show_gallery(arms: list[str], quantity: str) -> None:
    """The comparison over all bundled sentences, with bands."""
    texts = loaders.gallery_texts()
    models = [loaders.model(name) for name in arms]
    weights = [m.identity.weights_sha256 for m in models]

    def work(job: jobs.Job) -> LensComparison:
        readings = [logit_lens_kl(WatchedModel(model, job.tick), texts) for model in models]
        return compare_lens(*readings, quantity=quantity)

    label = f"Compare over the {len(texts)} bundled sentences"
    job = jobs.run_button(jobs.job_name("lens", weights, quantity), label, 2 * len(texts), work)
    if job is None:
        return
    result: LensComparison = job.result
    left, right = st.columns(2)
    with left:
        page_parts.figure(apply_style(result.figure(), title="Both models, simultaneous 95 % band"), "lens_curves")
    with right:
        page_parts.figure(
            apply_style(result.difference_figure(), title=f"{result.models[0]} minus {result.models[1]}"),
            "lens_difference",
        )
    overall = result.overall
    st.markdown(
        f"Area under the curve, first minus second: **{overall.auc}** nats × layers; relative to how far each "
        "prediction is from "
        f"unigram frequencies: **{overall.auc_normalised}**; settling depth: **{overall.settling}** layers."
    )
    st.warning(f"What may be said: {result.statement}.", icon=":material/gavel:")
    page_parts.provenance_line(
        result.provenance, f"{overall.tokens} tokens of {overall.documents} sentences", f"{job.seconds:.0f} s"
    )
    page_parts.exports(
        "lens-comparison", "lens_gallery", csv=lambda: result.table().to_csv(index=False),
        json=lambda: page_parts.as_json(result.as_dict()), html=lambda: result.figure().to_html(),
    )  # fmt: skip


show()
