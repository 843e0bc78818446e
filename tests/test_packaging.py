"""Does the wheel hold the library, the dashboard and the bundled models, and put one name into site-packages?"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
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


# -- from the installed wheel, outside the checkout ------------------------------------------------------------------------

# The report on a fifth of the sentences: the whole way from the bundled checkpoints to the page, in seconds.
REPORT = """
import sys
import engram_interp.cli
from engram_interp.studies import report
whole = report.load_gallery()
report.load_gallery = lambda: tuple(s for i, s in enumerate(whole) if i % 5 == 0 or s.category == "figure-7")
sys.argv = ["engram-interp", "report", "--quick", "--items", "10", "--out", "out"]
print(engram_interp.__file__, flush=True)
engram_interp.cli.main()
"""


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `pip install --target` put the wheel; what it depends on is taken from this environment."""
    target = tmp_path_factory.mktemp("site-packages")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", str(target), str(wheel)]
    run = subprocess.run([sys.executable, "-m", "pip", *install], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return target


def environment_of(installed: Path) -> dict[str, str]:
    """The installed package before the checkout that this environment may also know."""
    return {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}


def test_pip_puts_one_name_into_site_packages(installed: Path):
    assert {path.name for path in installed.iterdir()} - {"bin"} == {"engram_interp", "engram_interp-0.1.0.dist-info"}
    assert [path.name for path in (installed / "bin").iterdir()] == ["engram-interp"]


@pytest.mark.slow
def test_the_installed_wheel_writes_the_report(installed: Path, tmp_path: Path):
    command = [sys.executable, "-P", "-c", REPORT]
    environment = environment_of(installed)
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    used, said = run.stdout.splitlines()[:2]
    assert Path(used).is_relative_to(installed)
    assert said == "report: out/report.html"
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "mini-engram" in page and "Commit none (installed package)" in page
    assert page.count('class="claim ') == 6 and page.count("<figure>") > 12
    assert {path.name for path in tmp_path.iterdir()} == {"out"}, "nothing is written beside what was asked for"


@pytest.mark.slow
def test_the_installed_wheel_serves_the_dashboard(installed: Path, tmp_path: Path):
    pytest.importorskip("streamlit", reason="the dashboard needs the extra `app`")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-P", "-m", "engram_interp", "app", "--headless", "--port", str(port)]
    environment = environment_of(installed)
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as server:
        try:
            for path, expected in (("/_stcore/health", "ok"), ("/", "<title>Streamlit</title>")):
                assert expected in answer(f"http://127.0.0.1:{port}{path}", server)
        finally:
            server.terminate()


def answer(address: str, server: subprocess.Popen, seconds: float = 120) -> str:
    """The page at an address, as soon as the server answers with status 200."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(address, timeout=10) as response:
                assert response.status == 200
                return response.read().decode()
        except OSError:
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < deadline, f"{address}: no answer in {seconds} s"
            time.sleep(0.2)


def test_every_named_dependency_is_pinned():
    import re
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert {re.match(r"[\w.-]+", requirement).group() for requirement in named} == set(pins)
    assert pins["torch"] == "2.13.0"
