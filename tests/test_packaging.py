"""Does the wheel hold the library, the dashboard and the bundled models, and put one name into site-packages?"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as `pip wheel` builds it, without network."""
    pytest.importorskip("hatchling", reason="hatchling (extra `dev`) builds the wheel")
    out = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(out),
    ]
    run = subprocess.run([*build, str(ROOT)], capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def members(wheel: Path) -> list[str]:
    """The names in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def files_under(folder: str) -> set[str]:
    """Files of a folder of the checkout, relative to it."""
    top = ROOT / folder
    found = (path for path in top.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(top).as_posix() for path in found}


def carried(members: list[str], prefix: str) -> set[str]:
    """Members under a prefix, relative to it."""
    return {name.removeprefix(prefix) for name in members if name.startswith(prefix)}


def test_one_importable_name(members: list[str]):
    assert {name.split("/")[0] for name in members} == {"engram_interp", "engram_interp-0.1.0.dist-info"}


def test_no_compiled_files(members: list[str]):
    assert not [name for name in members if "__pycache__" in name or name.endswith(".pyc")]


def test_every_module_is_in_the_wheel(members: list[str]):
    modules = {name for name in files_under("engram_interp") if name.endswith(".py")}
    assert {"shapes.py", "runs/provenance.py", "memory/engram.py"} <= modules
    assert modules <= carried(members, "engram_interp/")


@pytest.mark.parametrize(("folder", "target"), [("app", "_app"), ("checkpoints", "_checkpoints")])
def test_data_folders_are_carried_whole(members: list[str], folder: str, target: str):
    assert carried(members, f"engram_interp/{target}/") == files_under(folder)


def test_programs_and_tests_stay_out(members: list[str]):
    assert not [name for name in members if name.split("/")[1] in {"tests", "experiments", ".ci", "data"}]


def test_entry_point_and_licence(wheel: Path, members: list[str]):
    with zipfile.ZipFile(wheel) as archive:
        entry_points = archive.read("engram_interp-0.1.0.dist-info/entry_points.txt").decode()
    assert "engram-interp = engram_interp.cli:main" in entry_points
    assert "engram_interp-0.1.0.dist-info/licenses/LICENSE" in members


def test_every_named_dependency_is_pinned():
    import re
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert {re.match(r"[\w.-]+", requirement).group() for requirement in named} == set(pins)
    assert pins["torch"] == "2.13.0"
