"""Ablate: what breaks without the memory?"""

from __future__ import annotations

import inspector
import jobs
import loaders
import page_parts
import state
import streamlit as st
from gate_strip import gate_strip

from engram_interp.figures.gatemap import show as visible
from engram_interp.figures.token_strip import describe, strip_data
from engram_interp.hooks import KINDS
from engram_interp.models.protocol import MemoryModel
from engram_interp.models.watched import WatchedModel
from engram_interp.probes.ablation import AblationEffects, ablation_effects, default_conditions, retention_figure
from engram_interp.probes.continuation import continuations
from engram_interp.probes.tasks import GENERATED_TASKS, load_tasks
from engram_interp.probes.token_effects import TokenEffects
from engram_interp.probes.token_readings import effect_grid

QUESTION = "What breaks without the memory?"
# Ways to remove a memory that need no option but data; the control is always shown beside the chosen one.
OFFERED = (
    "output_zero", "gate_closed", "embedding_zero", "mean", "resample", "hash_permute", "gate_mean", "gate_open",
    "conv_off", "gated_off", "mlp_zero", "attn_zero",
)  # fmt: skip
CONTROL = "equal_norm_random"
LIMIT = state.WINDOW


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
        kind, blocks = controls(model)
        show_text(name, model, text, kind, blocks)
        st.subheader("And over many items?", anchor=False)
        show_tasks(model)


def controls(model: MemoryModel) -> tuple[str, tuple[int, ...] | None]:
    """What is removed, and where."""
    with st.container(horizontal=True, gap="medium"):
        st.selectbox("Remove by", OFFERED, key="kind", bind="query-params", width=240)
        places = ["all", *map(str, model.engram_layers)]
        state.forget_unless("where", places)
        st.segmented_control("In block", places, default="all", required=True, key="where", bind="query-params")
    kind, where = KINDS[st.session_state["kind"]], st.session_state["where"]
    st.caption(
        f"What {kind.name} shows: {kind.question}. What the rest of the model then meets, beside its training: "
        f"{kind.distribution}."
    )
    return kind.name, None if where == "all" else (int(where),)


def show_text(name: str, model: MemoryModel, text: str, kind: str, blocks: tuple[int, ...] | None) -> None:
    """One text: change of every next token, beside the same change under a random write of equal norm."""
    tokens = len(model.tokenizer.encode(text, add_special_tokens=False).ids)
    if tokens > LIMIT:
        st.caption(f"{tokens} tokens; the first {LIMIT} are shown.")
    chosen = loaders.effects(name, text, (0, LIMIT), blocks, kind)
    random = loaders.effects(name, text, (0, LIMIT), blocks, CONTROL)
    grid = effect_grid([chosen, random])
    token = state.token_in("ablated", text, len(chosen.tokens))
    state.share_token(grid.peak if token is None else token, grid.peak)
    token = grid.peak if token is None else token
    data = strip_data(
        chosen.tokens, grid.shown, grid.bars, grid.grid, grid.labels, low=grid.low, high=grid.high, signed=True,
        unit="nats of log p of the next token owed to the memory (orange: it helps)", middle="",
    )  # fmt: skip
    gate_strip(
        data, key="ablated", title=kind, alt=describe(data), caption=page_parts.provenance_text(chosen.provenance),
        selected=token, layer=-1, bars_show="size of the change, the chosen ablation beside the random control",
    )  # fmt: skip
    page_parts.provenance_line(chosen.provenance, f"{len(chosen.tokens)} tokens")
    after, worst, written = st.tabs([f"After token {token}", "Where the memory matters most", "What it writes next"])
    with after:
        inspector.predictions(chosen, token)
    with worst:
        page_parts.table(worst_hit(chosen), "worst", height=360)
    with written:
        show_continuation(model, text, kind, blocks)
    page_parts.exports(
        "ablation-text", "ablate_text", csv=lambda: chosen.table().to_csv(index=False),
        json=lambda: page_parts.as_json({"chosen": chosen.as_dict(), "control": random.as_dict()}),
        html=lambda: chosen.figure().to_html(),
    )  # fmt: skip


def worst_hit(effects: TokenEffects):  # noqa: ANN201
    """The 20 positions that lose most."""
    frame = effects.table().dropna(subset=["change"]).sort_values("change", ascending=False, kind="stable").head(20)
    for column in ("token", "next_token", "top_with", "top_without"):
        frame[column] = [visible(text) for text in frame[column]]
    return frame[
        ["position", "token", "next_token", "change", "rank_with", "rank_without", "top_with", "top_without", "kl"]
    ].round(3)


def show_continuation(model: MemoryModel, text: str, kind: str, blocks: tuple[int, ...] | None) -> None:
    """Greedy continuation both ways."""
    written = continue_text(model, model.identity.weights_sha256, text, kind, blocks)
    arms = (("with", written.with_memory), ("without", written.without))
    for column, (label, tokens) in zip(st.columns(2), arms, strict=True):
        with column:
            st.caption(f"{label} the memory")
            st.code("".join(tokens), language=None, wrap_lines=True)
    apart = "never part here" if written.parted is None else f"part at token {written.parted + 1}"
    st.caption(f"Greedy, {len(written.without)} tokens: the two {apart}.")


@st.cache_resource(max_entries=64, show_spinner="Continuing the text")
def continue_text(_model: MemoryModel, weights: str, text: str, kind: str, blocks: tuple[int, ...] | None):  # noqa: ANN201
    """Continuations, kept by weights, text and ablation."""
    return continuations(
        _model, text, kind=kind, blocks=blocks, statistics=loaders.statistics_for(_model, weights, kind)
    )


def show_tasks(model: MemoryModel) -> None:
    """Retained scores by kind of task, with intervals and controls."""
    limit = st.select_slider(
        "Items per task", [20, 50, 100, 200], value=50, key="items", bind="query-params", width=300
    )
    texts, weights = loaders.gallery_texts(), model.identity.weights_sha256

    def work(job: jobs.Job) -> AblationEffects:
        from engram_interp.hooks import collect_memory_statistics

        watched = WatchedModel(model, job.tick)
        tasks = load_tasks(GENERATED_TASKS, model.tokenizer, limit=limit)
        statistics = collect_memory_statistics(watched, texts)

        def keep(so_far: AblationEffects) -> None:
            done = so_far.provenance.options["tasks"]
            job.keep(so_far, f"{len(done)} of {len(tasks)} tasks ({', '.join(done)})")

        return ablation_effects(watched, tasks, default_conditions(model), statistics=statistics, after_task=keep)

    label = f"Score {len(GENERATED_TASKS)} tasks under {len(default_conditions(model))} conditions"
    job = jobs.run_button(jobs.job_name("ablate", weights, limit), label, loaders.task_forwards(model, limit), work)
    if job is None:
        st.caption(
            "Paired over the same items, each kind on all memories jointly and on each block, with equal-norm and "
            "matched controls."
        )
        return
    effects: AblationEffects = job.result
    table = summary(effects, job.name, len(effects.items))
    joint = [c.label for c in effects.conditions if c.blocks is None]
    plot = retention_figure(table, joint)
    page_parts.figure(plot, "retained", alt="Retained fraction of each task's score by ablation")
    page_parts.table(table, "effects", height=360)
    unknown = sorted(set(table.loc[table["retained_above_chance"].isna(), "task"]))
    if unknown:
        st.warning(f"Not estimable for {', '.join(unknown)}: the full model's score cannot be told from chance there.")
    st.caption("Intervals are over items for this checkpoint; they say nothing about another training seed.")
    page_parts.provenance_line(effects.provenance, f"{job.elapsed:.0f} s")
    page_parts.exports(
        "ablation", "ablate_tasks", csv=lambda: table.to_csv(index=False),
        json=lambda: page_parts.as_json(effects.as_dict()),
        html=lambda: retention_figure(table, joint).to_html(),
    )  # fmt: skip


@st.cache_resource(max_entries=16, show_spinner="Estimating intervals")
def summary(_effects: AblationEffects, job: str, items: int):  # noqa: ANN201
    """Estimates with intervals of a job's result, of which there is one for every number of items."""
    return _effects.table()


show()
