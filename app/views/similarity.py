"""Similarity: do shallow Engram layers look like deep baseline layers?"""

from __future__ import annotations

import jobs
import loaders
import page_parts
import state
import streamlit as st

from engram_interp.gallery import load_gallery
from engram_interp.models.watched import WatchedModel
from engram_interp.probes.similarity import CKAHeatmap, cka_heatmap

QUESTION = "Do shallow Engram layers look like deep baseline layers?"
POSITIONS = {"entity_final": "last token of names", "one_per_document": "one token per sentence", "all": "every token"}
EXPLANATION = (
    "Every layer of both models reads the same tokens; CKA says how alike two layers arrange them, from 0 to 1. If the "
    "memory spares the first layers their work, a layer of this model should look most like a deeper layer of the "
    "baseline, and by more than another seed of the baseline does."
)


def show() -> None:
    """The page."""
    st.title(QUESTION)
    name = st.session_state["model"]
    others = loaders.partners(name)
    if not others:
        st.info(
            "This needs a second model with the same tokenizer. Start the dashboard with `--model DIRECTORY` for one."
        )
        return
    with st.container(horizontal=True, gap="medium"):
        state.forget_unless("baseline", others)
        start = others.index("mini-moe") if "mini-moe" in others else 0
        st.selectbox("Baseline (rows)", others, index=start, key="baseline", bind="query-params", width=240)
        rest = ["none", *(other for other in others if other != st.session_state["baseline"])]
        state.forget_unless("control", rest)
        seed = rest.index("mini-moe-control") if "mini-moe-control" in rest else 0
        st.selectbox(
            "Control: another seed of the baseline", rest, index=seed, key="control", bind="query-params", width=280,
            help="Its depth in the baseline is the null: two seeds of one architecture should match layer by layer.",
        )  # fmt: skip
        st.segmented_control(
            "Rows at", list(POSITIONS), default="entity_final", required=True, key="at", bind="query-params",
            format_func=POSITIONS.get, wrap=True,
        )  # fmt: skip
        st.toggle(
            "Shuffled-document null",
            key="null",
            bind="query-params",
            help="200 permutations; takes a few times longer.",
        )
    with page_parts.readable_errors():
        run(name, st.session_state["baseline"], st.session_state["control"], st.session_state["at"])


def run(name: str, baseline: str, control: str, positions: str) -> None:
    """Start or show the heat map."""
    models = [loaders.model(n) for n in (name, baseline, *([control] if control != "none" else []))]
    sentences, permutations = load_gallery(), 200 if st.session_state["null"] else 0
    part = jobs.first_part(sentences)

    def work(job: jobs.Job) -> CKAHeatmap:
        first, second, *seeds = [WatchedModel(model, job.tick) for model in models]
        options = {"control": seeds[0] if seeds else None, "permutations": permutations}
        if part:
            job.keep(
                cka_heatmap(first, second, part, positions, **options), f"{len(part)} of {len(sentences)} sentences"
            )
        return cka_heatmap(first, second, sentences, positions, **options)

    weights = [m.identity.weights_sha256 for m in models]
    label = f"Compare every layer over the {len(sentences)} bundled sentences"
    total = len(models) * (len(sentences) + len(part))
    job = jobs.run_button(jobs.job_name("cka", weights, positions, permutations), label, total, work)
    if job is None:
        st.caption(EXPLANATION)
    else:
        result(job)


def result(job: jobs.Job) -> None:
    """Heat map, depths, and what may be claimed."""
    heat: CKAHeatmap = job.result
    page_parts.figure(heat.figure(), "cka", alt="CKA of every baseline layer with every Engram layer")
    for warning in heat.warnings:
        st.caption(f":material/info: {warning}")
    st.subheader("What may be claimed", anchor=False)
    supported = [claim for claim in heat.claims if claim.allowed]
    if not supported:
        st.warning(
            "No layer's depth differs from the null: the claim of effectively deeper layers is not supported here."
        )
    for claim in supported:
        st.markdown(f"- {claim.sentence}")
    with st.expander("Every layer", expanded=not supported):
        for claim in heat.claims:
            st.markdown(f"- {claim.sentence}")
    page_parts.table(heat.depths(), "depths", height=360)
    st.caption(
        "CKA is unbiased, with a delete-one jackknife over sentences; soft alignment is printed with its null, "
        "because two seeds of "
        "one architecture also give an index that differs from the diagonal."
    )
    page_parts.provenance_line(
        heat.provenance, f"{heat.matrix.n} rows of {heat.matrix.documents} sentences", f"{job.elapsed:.0f} s"
    )
    page_parts.exports(
        "cka", "cka", csv=lambda: heat.table().to_csv(index=False), json=lambda: page_parts.as_json(heat.as_dict()),
        html=lambda: heat.figure().to_html(),
    )  # fmt: skip


show()
