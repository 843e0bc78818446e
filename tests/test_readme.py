"""The README says what is true: its tree is on disk, its Python runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(kind):
    every = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [body for found, body in every if found == kind]


def test_every_path_of_the_tree_exists():
    tree = next(block for block in _blocks("") if block.startswith("engram_interp/"))
    parent = Path()
    for line in tree.splitlines():
        name = line.split()[0]
        path = (parent if line.startswith("  ") else Path()) / name
        assert (ROOT / path).exists(), path
        if not line.startswith("  "):
            parent = Path(name)


def test_every_python_block_runs():
    if not (ROOT / "checkpoints/mini-engram/model.safetensors").is_file():
        pytest.fail("the bundled checkpoints are missing")
    for block in _blocks("python"):
        exec(compile(block, "README.md", "exec"), {})


def test_its_tables_are_what_the_results_say():
    from engram_interp.studies.pair_tables import rewrite_readme

    assert rewrite_readme(ROOT) == README, "run python -m experiments"


def test_every_command_exists():
    import engram_interp.cli as cli

    known = set(cli.app._subcommands) | {"memory", "runs"}
    for command in re.findall(r"engram-interp ([a-z]+)", README):
        assert command in known, command
