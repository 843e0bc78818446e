"""`engram-interp card`: evaluate what a training configuration made, and write its card and curves."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from engram_interp.figures.monitor import monitor_figure
from engram_interp.models.registry import load
from engram_interp.runs.atomic import write_atomically
from engram_interp.studies.card import CURVES, model_card
from engram_interp.studies.evaluation import evaluate
from engram_interp.training.config import load_train_config
from engram_interp.training.train import MEMORY


def run_card(config: Path, data: Path | None, *, items: int, articles: int | None, out: Path | None) -> str:
    """The card of a finished run; with `out`, written there with `memory.svg` beside it (drawing needs a Chromium)."""
    settings = load_train_config(config)
    log = settings.out / MEMORY
    monitor = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    evaluation = evaluate(load(settings.out), data, limit=items, articles=articles, progress=sys.stderr.isatty())
    text = model_card(settings, evaluation, str(config), monitor)
    if out is not None:
        if monitor:
            title = f"{settings.model.name}: its memory while training"
            figure = monitor_figure(monitor, tokens_per_step=settings.tokens_per_step, title=title)
            image = figure.to_image("svg", width=820)
            write_atomically(out.with_name(CURVES), lambda part: part.write_bytes(image))
        write_atomically(out, lambda part: part.write_text(text, encoding="utf-8"))
    return text
