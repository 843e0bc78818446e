"""`experiments/README.md`: the list of studies, made from the studies themselves, and what they last found.

Run folders are not part of the project; `collect_results` keeps of each finished one what is needed to defend its
headline (`experiments/results/NAME.json`), and the file is rendered from these alone, so that a test can check it.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

from engram_interp.runs.atomic import write_atomically
from engram_interp.runs.folder import OpenRun, list_runs, open_run
from engram_interp.studies.program import HEADLINE, SPEED

HEADER = """# Experiments

Each study is one command: a strict configuration, a run folder (manifest, parquet tables, figure.html), and a result
with intervals. A study killed at any moment goes on where it was when started again, to the same bytes. `--seeds`,
`--out`, `--data` and `--workers` override the configuration; `engram-interp runs list|show|table` reads the folders.

| study | question | command | tables |
|---|---|---|---|
"""
FOOTER = """
This file is written by `python -m experiments`, which also takes in the finished runs under `runs/studies`.
"""
_NO_DATA = ("corpus_scaling", "long_context", "offload")  # generated texts, or a token file
_KEPT = ("study", "models", "texts_sha256", "seeds", "commit", "versions", "finished")


def render_readme(experiments: Path) -> str:
    """The whole file, from the docstring, the configuration and the declared tables of every study.

    Raises: ValueError naming a study without a docstring, a `TABLES` constant or a configuration.
    """
    programs = sorted(p for p in experiments.glob("*.py") if not p.name.startswith("_"))
    results = [_result(p.stem, experiments / "results" / f"{p.stem}.json") for p in programs]
    return HEADER + "".join(_row(p) for p in programs) + "\n## Results\n" + "".join(results) + FOOTER


def collect_results(runs: Path, results: Path) -> list[str]:
    """Keep the headline of every finished study under `runs`; gives their names.

    Raises: RunError when a finished run is damaged.
    """
    taken = []
    for run in list_runs(runs) if runs.is_dir() else []:
        if run.status != "done" or run.name != run.study or not (run.path / HEADLINE).is_file():
            continue
        opened = open_run(run.path)
        kept = opened.manifest.model_dump(include=set(_KEPT))
        kept["headline"] = (run.path / HEADLINE).read_text(encoding="utf-8").splitlines()
        speed = run.path / SPEED  # training studies have none: they have trained tokens and minutes
        kept["speed"] = json.loads(speed.read_text(encoding="utf-8")) if speed.is_file() else None
        kept["training"] = _training(opened)
        results.mkdir(exist_ok=True)
        text = json.dumps(kept, indent=1, sort_keys=True) + "\n"
        write_atomically(results / f"{run.study}.json", lambda part, text=text: part.write_text(text, encoding="utf-8"))
        taken.append(run.study)
    return taken


def _training(run: OpenRun) -> dict[str, int | float] | None:
    """Runs, tokens and hours that a training study took; None for every other study."""
    if not {"articles", "runs"} <= set(run.manifest.tables):
        return None
    runs = run.table("runs")
    tokens, minutes = (runs[name].to_numpy() for name in ("trained_tokens", "minutes"))
    return {"runs": len(runs), "tokens": int(tokens.sum()), "hours": float(minutes.sum() / 60)}


def _result(study: str, file: Path) -> str:
    if not file.is_file():
        return f"\n### {study}\n\nNot run yet.\n"
    kept = json.loads(file.read_text(encoding="utf-8"))
    models = ", ".join(f"{name} {digest[:12]}" for name, digest in kept["models"].items())
    where = f"{models}; seeds {', '.join(map(str, kept['seeds']))}; {kept['finished']}; commit {kept['commit'] or 'unknown'}"
    if kept["speed"]:
        where += f"; {kept['speed']['items_per_second']:.3g} items/s under {kept['speed']['conditions']} conditions, "
        where += f"{kept['speed']['workers']} processes"
    if cost := kept["training"]:
        where += f"; {cost['runs']} runs, {cost['tokens'] / 1e6:.1f} M tokens, {cost['hours']:.2f} hours of one core"
    where = where.removeprefix("; ")  # a study that trains its models names none
    return f"\n### {study}\n\n{where}\n\n```\n" + "\n".join(kept["headline"]) + "\n```\n"


def _row(program: Path) -> str:
    source = program.read_text(encoding="utf-8")
    tree = ast.parse(source)
    question = (ast.get_docstring(tree) or "").split("\n")[0]
    tables = next(
        (ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "TABLES"),  # type: ignore[attr-defined]
        None,
    )
    config = program.parent / "configs" / f"{program.stem}.yaml"
    if not question or not tables or not config.is_file():
        raise ValueError(f"{program.name}: expected a docstring, TABLES and configs/{config.name}")
    data = "" if "training_main" in source or program.stem in _NO_DATA else " --data DATA"
    command = f"`python -m experiments.{program.stem}{data}`"
    return f"| {program.stem} | {question} | {command} | {', '.join(tables)} |\n"
