"""Does the launcher start the right file, for this machine only, with the models that were named?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engram_interp import app_launcher


def test_the_command_names_models_and_keeps_to_this_machine(tmp_path: Path):
    command = app_launcher.app_command([str(tmp_path)], runs=str(tmp_path), port=9000, headless=True)
    before, after = command[: command.index("--")], command[command.index("--") + 1 :]
    assert after == ["--model", str(tmp_path.resolve()), "--runs", str(tmp_path.resolve())]
    assert before[before.index("--server.address") + 1] == "127.0.0.1"
    assert before[before.index("--server.headless") + 1] == "true"
    assert before[before.index("--server.port") + 1] == "9000"
    assert Path(before[before.index("run") + 1]).name == "main.py"


@pytest.mark.parametrize(("options", "match"), [({"models": ["/no/such"]}, "directory"), ({"port": 0}, "port")])
def test_bad_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        app_launcher.app_command(**options)


def test_without_streamlit_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(app_launcher.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"engram-interp\[app\]"):
        app_launcher.run_app()


def test_the_server_finds_this_package(tmp_path: Path):
    program = "import engram_interp; print(engram_interp.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=app_launcher.app_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(run.stdout.strip()).parent == Path(app_launcher.__file__).parent


def test_ending_the_program_ends_its_server():
    """`kill` on the command must not leave a server that holds the port."""
    program = (
        "import sys; from engram_interp import app_launcher as a\n"
        "wait = 'import os, time; print(os.getpid(), flush=True); time.sleep(100)'\n"
        "a.app_command = lambda *_: [sys.executable, '-c', wait]\n"
        "sys.exit(a.run_app() == 0)"
    )
    environment = app_launcher.app_environment()
    with subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        server = int(run.stdout.readline())
        run.terminate()
        assert run.wait(60) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)
