"""`engram-interp ablate MODEL --config F`: ablation effects of any model from one file, without a run folder."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field

from engram_interp.hooks.statistics import collect_memory_statistics
from engram_interp.models.registry import load
from engram_interp.probes.ablation import Condition, ablation_effects, default_conditions
from engram_interp.studies.config import StudyConfig, load_study_config
from engram_interp.studies.texts import fit_texts, study_tasks


class AblateConfig(StudyConfig):
    """Tasks and conditions; without conditions the default family: zero, mean, resample, permuted hash, equal norm, matched MLP."""

    conditions: tuple[Condition, ...] = Field(())


def run_ablate(
    model: str, config: Path, *, data: Path | None = None, as_json: bool = False, out: Path | None = None
) -> int:
    """Print the table of effects, or write it (.html is the figure, .csv the table, .json everything).

    Raises: ConfigError, CheckpointError or ValueError, each naming what was expected; ValueError for another ending of `out`.
    """
    settings = load_study_config(AblateConfig, config)
    if data is not None:
        settings = settings.model_copy(update={"data": data})
    opened = load(model)
    conditions = list(settings.conditions) or default_conditions(opened)
    seed = settings.seeds[0]
    statistics = collect_memory_statistics(opened, fit_texts(settings), seed=seed)
    tasks = study_tasks(settings, opened, seed)
    effects = ablation_effects(
        opened, tasks, conditions, statistics=statistics, batch_tokens=settings.batch_tokens, seed=seed, progress=not as_json
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
