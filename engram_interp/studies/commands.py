"""Studies from a terminal.

`python -m experiments.NAME [CONFIG] [--seeds ...] [--out DIR] [--data DIR] [--workers N]` runs or continues a study in
a run folder;
`engram-interp ablate MODEL --config F` gives the ablation effects of any model from one file, without a run folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from pydantic import Field

from engram_interp.models.adapters.opening import open_decoder
from engram_interp.models.protocol import MemoryModel
from engram_interp.probes.ablation import (
    DEFAULT_KINDS,
    AblationEffects,
    Condition,
    ablation_effects,
    default_conditions,
)
from engram_interp.runs.result_files import write_form
from engram_interp.studies.ablation import fitted_statistics, known_kinds
from engram_interp.studies.config import StudyConfig, changed, load_study_config
from engram_interp.studies.program import SPEED, Study, run
from engram_interp.studies.texts import fit_texts, study_tasks
from engram_interp.studies.training_study import TrainingStudy, compare_runs, run_training_study, smoke_version

RUNS = Path("runs/studies")


def main(study: Study, arguments: Sequence[str] | None = None) -> int:
    """Run a study from its command line; prints the headline and the run folder.

    Raises: ConfigError, RunError, CheckpointError or ValueError from the library become one line on standard error and
        exit code 2.
    """
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{study.name}")
    default = Path("experiments/configs") / f"{study.name}.yaml"
    parser.add_argument("config", type=Path, nargs="?", default=default, help="a YAML file (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the configuration's")
    parser.add_argument("--out", type=Path, default=RUNS / study.name, help="run folder (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder with the corpora and eval/, instead of the configuration's")
    parser.add_argument("--workers", type=int, help="processes that share the work")
    given = parser.parse_args(arguments)
    try:
        config = load_study_config(study.config, given.config)
        changes = {"seeds": tuple(given.seeds) if given.seeds else None, "data": given.data, "workers": given.workers}
        config = changed(config, **changes)
        report = run(study, config, given.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*report.headline, sep="\n")
    if (given.out / SPEED).is_file():
        print(f"speed: {(given.out / SPEED).read_text(encoding='utf-8')}")
    print(f"run folder: {given.out}")
    return 0


def training_main(study: TrainingStudy, arguments: Sequence[str] | None = None) -> int:
    """Run or continue a training study from its command line; prints the runs, the conclusion and the run folder."""
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{study.name}")
    default = Path("experiments/configs") / f"{study.name}.yaml"
    parser.add_argument("config", type=Path, nargs="?", default=default, help="a YAML file (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the configuration's")
    parser.add_argument("--out", type=Path, default=RUNS / study.name, help="run folder (default: %(default)s)")
    parser.add_argument(
        "--smoke", action="store_true", help="seconds instead of hours: tests the plumbing, not the claim"
    )
    given = parser.parse_args(arguments)
    try:
        config = load_study_config(study.config, given.config)
        changes = {"seeds": tuple(given.seeds)} if given.seeds else {}
        config = config.model_copy(update=changes)
        config = (
            smoke_version(config, given.out.with_name(f"{given.out.name}-tokens"))
            if given.smoke
            else config.model_copy(update={"smoke": {}})
        )
        articles = run_training_study(study, config, given.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(compare_runs(articles, articles["variant"].iloc[0]).to_string(index=False, float_format="%.4f"))
    print(*study.conclude(config, articles)[0], f"run folder: {given.out}", sep="\n")
    return 0


class AblateConfig(StudyConfig):
    """Tasks, `conditions`, and `kinds` taken jointly and per block; with neither, the default family of kinds.

    The configuration of `remove_engram` is one of these; its `baseline` is not read here.
    """

    conditions: tuple[Condition, ...] = Field(())
    kinds: tuple[str, ...] = Field(())
    baseline: str | None = None


def run_ablate(
    model: str,
    config: Path,
    *,
    data: Path | None = None,
    base: Path | None = None,
    as_json: bool = False,
    out: Path | None = None,
) -> int:
    """Print the table of effects, or write it (.html is the figure, .csv the table, .json everything).

    Args: base: the base model of an engram-peft adapter.
    Raises: ConfigError, CheckpointError or ValueError, each naming what was expected; ValueError for another ending of
        `out`.
    """
    if out is not None and out.suffix not in (".html", ".csv", ".json"):
        raise ValueError(f"expected a file ending in .html, .csv or .json, found {out.name!r}")
    settings = changed(load_study_config(AblateConfig, config), data=data)
    opened = cast("MemoryModel", open_decoder(model, base or settings.base))
    kinds = settings.kinds or (() if settings.conditions else DEFAULT_KINDS)
    conditions = [*settings.conditions, *default_conditions(opened, known_kinds(kinds))]
    seed = settings.seeds[0]
    statistics = fitted_statistics(opened, fit_texts(settings), conditions, seed)
    tasks = study_tasks(settings, opened, seed)
    effects = ablation_effects(
        opened,
        tasks,
        conditions,
        statistics=statistics,
        batch_tokens=settings.batch_tokens,
        seed=seed,
        progress=not as_json,
    )
    if out is not None:
        _write(effects, out)
    elif as_json:
        print(json.dumps(effects.as_dict(), allow_nan=False))
    else:
        print(effects.table().to_string(index=False, float_format="%.3f"))
    return 0


def _write(effects: AblationEffects, out: Path) -> None:
    forms = {
        ".html": lambda: effects.figure().to_html(include_plotlyjs=True),
        ".csv": lambda: effects.table().to_csv(index=False),
        ".json": lambda: json.dumps(effects.as_dict(), allow_nan=False),
    }
    write_form(out, forms)
