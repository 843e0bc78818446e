"""Does every program of `probes/` run, as a script and as a notebook, and does its text say what a reader needs?"""

from __future__ import annotations

import functools
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

from engram_interp.models import registry

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = sorted(path for path in (ROOT / "probes").glob("*.py") if path.name != "__init__.py")
every_program = pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
_read_once = functools.cache(registry.load_model)  # scripts in one process share what they only read
_PATIENCE = 900  # seconds: nothing is measured here, and a busy machine is no failure
_FIGURE = "application/vnd.plotly.v1+json"


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every program executed as a notebook."""
    out = tmp_path_factory.mktemp("notebooks")
    # tqdm asks for ipywidgets, which we do not need.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore:IProgress not found"}
    command = [sys.executable, str(Path(__file__).with_name("execute_notebooks.py")), str(out), *map(str, PROGRAMS)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return out


@every_program
def test_runs_as_a_script(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ENGRAM_FIGURES", str(tmp_path))
    monkeypatch.setattr(registry, "load_model", _read_once)
    runpy.run_path(str(program), run_name="__main__")
    printed = capsys.readouterr().out
    figures = re.findall(r"^figure: (.+)$", printed, flags=re.MULTILINE)
    assert len(printed.splitlines()) > len(figures) + 5, "expected a table or a sentence of results"
    for figure in figures:
        page = Path(figure).read_text(encoding="utf-8")
        assert 'src="plotly.min.js"' in page and "Plotly.newPlot" in page
    if figures:
        assert (tmp_path / "plotly.min.js").stat().st_size > 10**6
    assert len(set(figures)) == len(figures) >= program.read_text(encoding="utf-8").count("show_figure(")


@pytest.mark.timeout(_PATIENCE)
@every_program
def test_runs_as_a_notebook(program, notebooks):
    executed = nbformat.read(notebooks / f"{program.stem}.ipynb", as_version=4)
    outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    text = program.read_text(encoding="utf-8")
    assert "text/html" in kinds, "a table is displayed as a table"
    assert (_FIGURE in kinds) == ("show_figure(" in text)
    assert not [output for output in outputs if output.get("name") == "stderr"]


@every_program
def test_the_text_says_what_is_asked_and_how_it_misleads(program):
    first, *_ = jupytext.read(program).cells
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    if program.stem != "tour":
        assert first.source.splitlines()[0].endswith("?")
        for heading in ("**Definition.**", "**Units.**", "**How it can mislead.**"):
            assert heading in first.source, heading


def test_a_program_is_started_by_its_path(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("ENGRAM_FIGURES", None)
    run = subprocess.run(
        [sys.executable, str(ROOT / "probes/attribution.py")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "runs/figures/rows-by-token.html").is_file()
