"""Runs: what did the experiments find?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import loaders
import page_parts
import state
import streamlit as st

from engram_interp.figures.bars import Bars, bars_figure
from engram_interp.runs import OpenRun, RunSummary, list_runs, open_run
from engram_interp.runs.table_view import compare_configs, metrics_of, pivot_metric

if TYPE_CHECKING:
    import pandas as pd

QUESTION = "What did the experiments find?"
MOST = 6
MOST_BARS = 8  # as many as have a colour and a pattern of their own


def show() -> None:
    """The page."""
    st.title(QUESTION)
    folder = loaders.runs_directory()
    if folder is None:
        nothing("no folder `runs` where the dashboard was started")
        return
    with page_parts.readable_errors():
        runs = list_runs(folder)
        if not runs:
            nothing("the folder holds no run")
            return
        table(runs)


def nothing(reason: str) -> None:
    """How to make a run."""
    st.info(
        f"Nothing to show: {reason}. A study writes a run folder; in a checkout, for instance:\n\n"
        "`python -m experiments remove_engram`\n\nThen start the dashboard with `engram-interp app --runs DIRECTORY`."
    )


def table(runs: list[RunSummary]) -> None:
    """Every run, broken ones with their reason; details of those chosen."""
    wanted = st.text_input("Filter by name, study or status", key="filter", bind="query-params", width=360).lower()
    shown = [run for run in runs if wanted in f"{run.name} {run.study} {run.status}".lower()]
    rows = [
        {
            "run": r.name, "study": r.study, "status": r.status, "seeds": ", ".join(map(str, r.seeds)),
            "started": r.started.replace("T", " ")[:16], "tables": ", ".join(r.tables),
        }
        for r in shown
    ]  # fmt: skip
    st.dataframe(rows, hide_index=True, key="runs")
    for run in shown:
        if run.status == "broken":
            st.warning(f"{run.name} cannot be read: {run.reason}", icon=":material/broken_image:")
    names = [run.name for run in shown if run.status != "broken"]
    state.forget_choices("chosen", names)
    st.multiselect(
        f"Look at (at most {MOST})", names, default=names[:1], max_selections=MOST, key="chosen", bind="query-params",
    )  # fmt: skip
    opened = {run.name: open_run(run.path) for run in shown if run.name in st.session_state["chosen"]}
    if opened:
        compare(opened)


def compare(runs: dict[str, OpenRun]) -> None:
    """Metrics by condition, configurations, manifests."""
    tables = list(dict.fromkeys(name for run in runs.values() for name in run.manifest.tables))
    results, configs, files = st.tabs(["Results", "Configurations", "Manifest and files"])
    with results, page_parts.readable_errors():
        if tables:
            metric(runs, tables)
        else:
            st.info("No finished table in these runs.")
    with configs:
        page_parts.table(compare_configs({name: run.manifest.config for name, run in runs.items()}), "configs")
    with files:
        for name, run in runs.items():
            st.markdown(f"**{name}**")
            st.code(json.dumps(run.manifest.model_dump(), indent=1, ensure_ascii=False), language="json", height=260)
            st.caption(
                ", ".join(sorted(str(p.relative_to(run.path)) for p in Path(run.path).rglob("*") if p.is_file())[:200])
            )


def metric(runs: dict[str, OpenRun], tables: list[str]) -> None:
    """One table of each run: a chart where it holds estimates with intervals, and the rows."""
    choice = st.selectbox("Table", tables, key="run_table", width=360)
    frames = {name: run.table(choice) for name, run in runs.items() if choice in run.manifest.tables}
    if estimates := metrics_of(next(iter(frames.values()))):
        chart(frames, st.selectbox("Estimate", estimates, key="metric", width=360))
    for name, frame in frames.items():
        st.caption(f"{name}: {len(frame)} rows")
        st.dataframe(frame.head(1000), hide_index=True, key=f"rows_{name}", height=260)
        page_parts.exports(f"{name}-{choice}", f"run_{name}", csv=lambda frame=frame: frame.to_csv(index=False))


def chart(frames: dict[str, pd.DataFrame], name: str) -> None:
    """One estimate by condition; where there are many, those chosen."""
    bars, groups = pivot_metric(frames, name)
    labels = [label for label, *_ in bars]
    if len(labels) > MOST_BARS:
        st.multiselect(f"Conditions (at most {MOST_BARS} of {len(labels)})", labels, default=labels[:MOST_BARS],
                       max_selections=MOST_BARS, key=f"bars_{name}_{len(labels)}")  # fmt: skip
        labels = st.session_state[f"bars_{name}_{len(labels)}"]
    shown = [Bars(*bar) for bar in bars if bar[0] in labels]
    if shown:
        plot = bars_figure(shown, groups, title=f"{name}, 95 % interval", y_title=name)
        page_parts.figure(plot, "metric", alt=f"{name} by condition and run")


show()
