"""Does every program of `probes/` run, as a script and as a notebook, and does its text say what a reader needs?"""

from __future__ import annotations

import functools
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode, validate

from engram_interp.models import registry

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = sorted(path for path in (ROOT / "probes").glob("*.py") if path.name != "__init__.py")
every_program = pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
_read_once = functools.cache(registry.load_model)  # scripts in one process share what they only read
_PATIENCE = 600  # seconds for one cell: nothing is measured here, and a busy machine is no failure
_FIGURE = "application/vnd.plotly.v1+json"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """One Python kernel for all notebooks, which start it with an empty namespace: importing torch takes seconds."""
    from jupyter_client.manager import KernelManager

    manager = KernelManager(kernel_name="python3")
    manager.kernel_cmd = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    folder = tmp_path_factory.mktemp("kernel")
    environment = {
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(folder / "ipython"),
        "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm asks for ipywidgets, which we do not need
    }
    manager.start_kernel(cwd=str(folder), env=os.environ | environment)
    yield manager
    manager.shutdown_kernel(now=True)


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


@pytest.mark.timeout(2 * _PATIENCE)
@every_program
def test_runs_as_a_notebook(program, kernel):
    notebook = jupytext.read(program)
    executed = _execute(notebook, kernel)
    outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    text = program.read_text(encoding="utf-8")
    assert "text/html" in kinds, "a table is displayed as a table"
    assert (_FIGURE in kinds) == ("show_figure(" in text)
    assert not [output for output in outputs if output.get("name") == "stderr"]


def _execute(notebook: NotebookNode, kernel) -> NotebookNode:
    validate(notebook)
    try:
        return NotebookClient(notebook, km=kernel, timeout=_PATIENCE).execute()
    finally:
        reset = jupytext.reads("# %%\n%reset -f\n", fmt="py:percent")
        NotebookClient(reset, km=kernel, timeout=_PATIENCE).execute()


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
