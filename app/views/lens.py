"""Lens: how early is the answer readable?"""

from __future__ import annotations

from collections.abc import Sequence

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
from engram_interp.probes.lens_comparison import LensComparison, compare_lens, earlier_beyond_null

QUESTION = "How early is the answer readable?"
SHOWN = ("kl", "entropy", "cross_entropy", "agreement")
CAPTION = (
    "Lower earlier: the final prediction formed earlier. Dashed lines: where an Engram writes. Colours end at the "
    "largest value above the embedding, whose own reading often lies far beyond. Middle layers need not speak the "
    "basis of the last one, so a lower KL can be a matter of dialect; the first layers are read least reliably. The "
    "last layer is the prediction itself, so its KL is exactly 0."
)
VERDICTS = {
    "earlier": "beyond what two seeds of {other} differ by: **{first} forms its predictions earlier** here",
    "later": "beyond what two seeds of {other} differ by: **{first} forms its predictions later** here",
    "undecided": "not beyond what two seeds of {other} differ by: that one forms its predictions earlier is "
    "**not supported** here",
}


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
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
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
    shown = state.cut(models[0], text, state.WINDOW)
    if shown != text:
        st.caption(f"A long text: its first {state.WINDOW} tokens are shown.")
    results = [read(m, m.identity.weights_sha256, (shown,)) for m in models]
    largest = max(float(r.values(quantity)[1:].max()) for r in results)
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
    st.caption("KL to the final prediction and entropy, nats.")
    page_parts.exports(
        "lens", "lens_text", csv=lambda: results[0].table().to_csv(index=False),
        json=lambda: page_parts.as_json([r.as_dict() for r in results]), html=lambda: results[0].figure().to_html(),
    )  # fmt: skip


def control_choice(arms: list[str]) -> str | None:
    """Which model shows what another seed of the baseline changes by itself, None for none."""
    rest = ["none", *(name for name in loaders.partners(arms[0]) if name != arms[1])]
    state.forget_unless("lens_control", rest)
    seed = "mini-moe-control" if "mini-moe-control" in rest else "none"
    chosen = st.selectbox(
        "Null: another seed of the second model", rest, index=rest.index(seed), key="lens_control",
        bind="query-params", width=320,
        help="Two seeds of one architecture differ too; a difference has to lie beyond theirs to mean anything.",
    )  # fmt: skip
    return None if chosen == "none" else chosen


def show_gallery(arms: list[str], quantity: str) -> None:
    """The comparison over all bundled sentences, with bands and the null of another seed."""
    texts = loaders.gallery_texts()
    control = control_choice(arms)
    models = [loaders.model(name) for name in (*arms, *([control] if control else []))]
    weights, part = [m.identity.weights_sha256 for m in models], jobs.first_part(texts)

    def work(job: jobs.Job) -> tuple[LensComparison, LensComparison | None]:
        watched = [WatchedModel(model, job.tick) for model in models]
        if part:
            job.keep(compare(watched, part, quantity), f"{len(part)} of {len(texts)} sentences")
        return compare(watched, texts, quantity)

    label = f"Compare over the {len(texts)} bundled sentences"
    total = len(models) * (len(texts) + len(part))
    job = jobs.run_button(jobs.job_name("lens", weights, quantity), label, total, work)
    if job is not None:
        show_comparison(job)


def compare(models: list, texts: Sequence[str], quantity: str) -> tuple[LensComparison, LensComparison | None]:
    """The first model against the second, and the second against the third where there is one."""
    readings = [logit_lens_kl(model, texts) for model in models]
    null = compare_lens(readings[1], readings[2], quantity=quantity) if len(readings) > 2 else None
    return compare_lens(readings[0], readings[1], quantity=quantity), null


def show_comparison(job: jobs.Job) -> None:
    """Curves, areas, and what may be said."""
    result, null = job.result
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
    if null is None:
        verdict = "without a null, nothing can be said about which forms its predictions earlier"
    else:
        first, other = result.models
        st.markdown(f"Null, {null.models[0]} minus {null.models[1]}: **{null.overall.auc}** nats × layers.")
        verdict = "the area is " + VERDICTS[earlier_beyond_null(result, null)].format(first=first, other=other)
    st.warning(f"What may be said: {verdict}. It is about {result.statement}.", icon=":material/gavel:")
    page_parts.provenance_line(
        result.provenance, f"{overall.tokens} tokens of {overall.documents} sentences", f"{job.elapsed:.0f} s"
    )
    page_parts.exports(
        "lens-comparison", "lens_gallery", csv=lambda: result.table().to_csv(index=False),
        json=lambda: page_parts.as_json({"comparison": result.as_dict(), "null": null and null.as_dict()}),
        html=lambda: result.figure().to_html(),
    )  # fmt: skip


show()
