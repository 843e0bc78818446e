"""How does a study run? `python -m experiments.NAME CONFIG [--seeds ...] [--out DIR] [--data DIR]`

Configuration -> plan (a list of shards, each a function of configuration and seed alone) -> run folder -> tables and a
figure. Shards that exist are skipped, so a killed study started again ends with the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from engram_interp.models.protocol import MemoryModel
from engram_interp.models.registry import load
from engram_interp.runs.folder import RunFolder, start_run
from engram_interp.studies.config import StudyConfig

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Shard:
    """One piece of a table; `make` is deterministic."""

    table: str
    name: str
    make: Callable[[], pd.DataFrame]


@dataclass(frozen=True)
class Plan:
    """All pieces in order, the hash of every text they read, and the weights hash of every further model."""

    shards: tuple[Shard, ...]
    texts_sha256: str
    models: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Report:
    """What a study concludes: tables by name, one figure, and the lines it prints."""

    tables: dict[str, pd.DataFrame]
    figure: go.Figure
    headline: tuple[str, ...]


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
    context = Context(config, load(config.model))
    plan = study.plan(context)
    identity = {context.model.identity.name: context.model.identity.weights_sha256, **plan.models}
    described = json.loads(config.model_dump_json(exclude={"data"}))
    with start_run(
        out, study=study.name, config=described, seeds=config.seeds, models=identity, texts_sha256=plan.texts_sha256
    ) as folder:
        frames = _make(folder, plan)
        report = study.report(context, frames)
        for name, frame in report.tables.items():
            folder.write_table(name, frame)
        folder.write_text("figure.html", report.figure.to_html(include_plotlyjs=True))
    return report


def _make(folder: RunFolder, plan: Plan) -> dict[str, pd.DataFrame]:
    """Make what is missing, then join each table in the plan's order."""
    tables = list(dict.fromkeys(shard.table for shard in plan.shards))
    done = {table: set(folder.done_shards(table)) for table in tables}
    for shard in tqdm(plan.shards, unit="shard", desc=folder.manifest.study):
        if shard.name not in done[shard.table]:
            folder.write_shard(shard.table, shard.name, shard.make())
    return {table: folder.gather(table, [s.name for s in plan.shards if s.table == table]) for table in tables}
