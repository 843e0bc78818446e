"""The list of studies in `experiments/README.md`, made from the studies themselves so that it cannot fall behind."""

from __future__ import annotations

import ast
from pathlib import Path

HEADER = """# Experiments

Each study is one command: a strict configuration, a run folder (manifest, parquet tables, figure.html), and a result
with intervals. A study killed at any moment goes on where it was when started again, to the same bytes. `--seeds`,
`--out` and `--data` override the configuration; `engram-interp runs list|show|table` reads the folders.

| study | question | command | tables |
|---|---|---|---|
"""
FOOTER = "\nThis file is written by `python -m experiments`.\n"


def render_readme(experiments: Path) -> str:
    """The whole file, from the docstring, the configuration and the declared tables of every study.

    Raises: ValueError naming a study without a docstring, a `TABLES` constant or a configuration.
    """
    programs = sorted(p for p in experiments.glob("*.py") if not p.name.startswith("_"))
    return HEADER + "".join(_row(p) for p in programs) + FOOTER


def _row(program: Path) -> str:
    tree = ast.parse(program.read_text(encoding="utf-8"))
    question = (ast.get_docstring(tree) or "").split("\n")[0]
    tables = next(
        (ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "TABLES"),  # type: ignore[attr-defined]
        None,
    )
    config = program.parent / "configs" / f"{program.stem}.yaml"
    if not question or not tables or not config.is_file():
        raise ValueError(f"{program.name}: expected a docstring, TABLES and configs/{config.name}")
    command = f"`python -m experiments.{program.stem} experiments/configs/{config.name}`"
    return f"| {program.stem} | {question} | {command} | {', '.join(tables)} |\n"
