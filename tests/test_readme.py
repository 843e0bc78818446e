"""The README says what is true: its tree is on disk, its Python runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(kind):
    every = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [body for found, body in every if found == kind]


def _tree():
    """The paths of "Where things are"; a folder's contents are indented below it, folders end in a slash."""
    tree = next(block for block in _blocks("") if block.startswith("engram_interp/"))
    paths, parent = [], ""
    for line in tree.splitlines():
        name, _, says = line.strip().partition(" ")
        assert says.strip(), f"{name} has no description"
        if not line.startswith(" "):
            parent = name
        paths.append(parent + name if line.startswith(" ") else name)
    return paths


def _on_disk(folder):
    """Folders (with a slash) and modules in a folder of the repository, without what git ignores."""
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    ignored = {line.strip("/") for line in lines if not (folder and line.startswith("/"))}
    for path in sorted((ROOT / folder).iterdir()):
        if path.name.startswith((".", "__")) or path.name in ignored or path.suffix == ".egg-info":
            continue
        if path.is_dir() and any(file.is_file() and file.suffix != ".pyc" for file in path.rglob("*")):
            yield f"{folder}{path.name}/"
        elif path.suffix == ".py":
            yield f"{folder}{path.name}"


def test_the_tree_is_the_disk():
    listed = _tree()
    assert len(set(listed)) == len(listed)
    levels = ["", *{f"{path.partition('/')[0]}/" for path in listed if path.count("/") + (path[-1] != "/") > 1}]
    assert "engram_interp/" in levels
    assert sorted(listed) == sorted(path for level in levels for path in _on_disk(level))


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


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    every = "".join(
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", "probes/tour.py")
    )
    for target in set(re.findall(r"\bmake ([a-z]+)(?=[ `\n])", every.replace("and `make`", ""))):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
