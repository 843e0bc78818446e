"""Do imports go one way, and is nothing heavy imported before it is needed?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "torch",
    "transformers",
    "transformer_lens",
    "streamlit",
    "plotly",
    "pandas",
    "pyarrow",
    "scipy",
    "sympy",
    "wandb",
)

HELP = """
import contextlib, io, sys
sys.argv = ["engram-interp", *{arguments}]
from engram_interp.cli import main
out = io.StringIO()
try:
    with contextlib.redirect_stdout(out):
        code = main()
except SystemExit as leaving:
    code = leaving.code
assert not code, code
assert "gates" in out.getvalue().lower(), out.getvalue()
"""


def imported_after(program: str) -> set[str]:
    """Top-level modules a fresh interpreter holds after a program."""
    report = "\nimport sys; print('MODULES', *sorted({name.partition('.')[0] for name in sys.modules}))"
    run = subprocess.run(
        [sys.executable, "-c", program + report], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    line = next(line for line in reversed(run.stdout.splitlines()) if line.startswith("MODULES "))
    return set(line.split()[1:])


def test_import_rules_hold():
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    run = subprocess.run(
        [sys.executable, "-c", program, "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 broken" in run.stdout


def test_the_probe_sees_a_heavy_import():
    assert "numpy" in imported_after("import numpy")


def test_importing_the_package_imports_nothing_heavy():
    loaded = imported_after("import engram_interp")
    assert "engram_interp" in loaded
    assert not loaded.intersection(HEAVY)


@pytest.mark.parametrize("arguments", [["--help"], ["gates", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]):
    assert not imported_after(HELP.format(arguments=arguments)).intersection(HEAVY)
