"""How does a study run? `python -m experiments.NAME [CONFIG] [--seeds ...] [--out DIR] [--data DIR]`

Configuration -> plan (a list of shards, each a function of configuration and seed alone) -> run folder -> tables, a
figure, a headline. Shards that exist are skipped, so a killed study started again ends with the same bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from engram_interp.models.adapters.opening import open_decoder
from engram_interp.models.protocol import MemoryModel
from engram_interp.runs.folder import RunFolder, start_run
from engram_interp.studies.config import StudyConfig
from engram_interp.studies.pieces import Shard, make_shards

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

HEADLINE = "headline.txt"
SPEED = "speed.json"


@dataclass(frozen=True)
class Plan:
    """All pieces in order, the hash of every text they read, and the weights hash of models beside the study's own."""

    shards: tuple[Shard, ...]
    texts_sha256: str
    models: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Report:
    """What a study concludes: tables by name, one figure, the lines it prints, and tensors with their metadata."""

    tables: dict[str, pd.DataFrame]
    figure: go.Figure
    headline: tuple[str, ...]
    tensors: Mapping[str, tuple[dict[str, torch.Tensor], dict[str, str]]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Context:
    """A configuration and the model it names."""

    config: StudyConfig
    model: MemoryModel = field(repr=False)


@dataclass(frozen=True)
class Study:
    """A name, the configuration it takes, how it plans, and how it sums up the gathered tables."""

    name: str
    config: type[StudyConfig]
    plan: Callable[[Context], Plan]
    report: Callable[[Context, dict[str, pd.DataFrame]], Report]


def run(study: Study, config: StudyConfig, out: Path) -> Report:
    """Run or continue a study in a folder.

    Raises: RunError when the folder holds another run.
    """
    torch.set_num_threads(config.threads)
    context = Context(config, cast("MemoryModel", open_decoder(config.model, config.base)))
    plan = study.plan(context)
    identity = {context.model.identity.name: context.model.identity.weights_sha256, **plan.models}
    described = json.loads(config.model_dump_json(exclude={"data", "workers"}))
    with start_run(
        out, study=study.name, config=described, seeds=config.seeds, models=identity, texts_sha256=plan.texts_sha256
    ) as folder:
        frames = _make(folder, plan, config.workers)
        report = study.report(context, frames)
        for name, frame in report.tables.items():
            folder.write_table(name, frame)
        for name, (tensors, metadata) in report.tensors.items():
            folder.write_tensors(name, tensors, metadata)
        folder.write_text("figure.html", report.figure.to_html(include_plotlyjs=True))
        folder.write_text(HEADLINE, "\n".join(report.headline) + "\n")
    return report


def _make(folder: RunFolder, plan: Plan, workers: int) -> dict[str, pd.DataFrame]:
    """Make what is missing, then join each table in the plan's order; `speed.json` says how fast the last start was."""
    start = time.perf_counter()
    made = make_shards(folder, plan.shards, workers)
    seconds = time.perf_counter() - start
    tables = dict.fromkeys(table for shard in plan.shards for table in shard.tables)
    frames = {table: folder.gather(table, [s.name for s in plan.shards if table in s.tables]) for table in tables}
    if made:
        first = frames[plan.shards[0].tables[0]]
        conditions = first["condition"].nunique() if "condition" in first else 1
        speed = {"rows": made, "seconds": seconds, "workers": workers, "conditions": conditions}
        folder.write_text(SPEED, json.dumps(speed | {"items_per_second": made / conditions / seconds}))
    return frames
