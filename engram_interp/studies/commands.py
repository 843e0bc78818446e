"""Studies from a terminal.

`python -m experiments.NAME CONFIG [--seeds ...] [--out DIR] [--data DIR]` runs or continues a study in a run folder;
`engram-interp ablate MODEL --config F` gives the ablation effects of any model from one file, without a run folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from engram_interp.models.registry import load
from engram_interp.probes.ablation import DEFAULT_KINDS, Condition, ablation_effects, default_conditions
from engram_interp.studies.ablation import fitted_statistics, known_kinds
from engram_interp.studies.config import StudyConfig, load_study_config
from engram_interp.studies.program import Study, run
from engram_interp.studies.texts import fit_texts, study_tasks
from engram_interp.studies.training_study import TrainingStudy, compare_runs, run_training_study, smoke_version

RUNS = Path("runs/studies")


def main(study: Study, arguments: Sequence[str] | None = None) -> int:
    """Run a study from its command line; prints the headline and the run folder.

    Raises: ConfigError, RunError, CheckpointError or ValueError from the library become one line on standard error and
        exit code 2.
    """
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{study.name}")
    parser.add_argument("config", type=Path, help=f"a YAML file, such as experiments/configs/{study.name}.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the configuration's")
    parser.add_argument("--out", type=Path, default=RUNS / study.name, help="run folder (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder with the corpora and eval/, instead of the configuration's")
    given = parser.parse_args(arguments)
    try:
        config = load_study_config(study.config, given.config)
        changes = {"seeds": tuple(given.seeds) if given.seeds else None, "data": given.data}
        config = config.model_copy(update={k: v for k, v in changes.items() if v is not None})
        report = run(study, config, given.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*report.headline, sep="\n")
    print(f"run folder: {given.out}")
    return 0


def training_main(study: TrainingStudy, arguments: Sequence[str] | None = None) -> int:
    """Run or continue a training study from its command line; prints the runs, the conclusion and the run folder."""
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{study.name}")
    parser.add_argument("config", type=Path, help=f"a YAML file, such as experiments/configs/{study.name}.yaml")
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

    The configuration of `remove_engram` is one of these.
    """

    conditions: tuple[Condition, ...] = Field(())
    kinds: tuple[str, ...] = Field(())


def run_ablate(
    model: str, config: Path, *, data: Path | None = None, as_json: bool = False, out: Path | None = None
) -> int:
    """Print the table of effects, or write it (.html is the figure, .csv the table, .json everything).

    Raises: ConfigError, CheckpointError or ValueError, each naming what was expected; ValueError for another ending of
        `out`.
    """
    settings = load_study_config(AblateConfig, config)
    if data is not None:
        settings = settings.model_copy(update={"data": data})
    opened = load(model)
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


def _write(effects, out: Path) -> None:  # noqa: ANN001
    if out.suffix == ".html":
        effects.figure().write_html(out)
    elif out.suffix == ".csv":
        effects.table().to_csv(out, index=False)
    elif out.suffix == ".json":
        out.write_text(json.dumps(effects.as_dict(), allow_nan=False), encoding="utf-8")
    else:
        raise ValueError(f"expected a file ending in .html, .csv or .json, found {out.name!r}")
