"""How is the dashboard started? As a Streamlit server in its own process, on this machine's address only.

The application is data beside the package (`_app` in a wheel, `app/` in a checkout), because Streamlit runs files. The
models it may open are the bundled ones and the directories named here, nothing else.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

ADDRESS = "127.0.0.1"


def app_directory() -> Path:
    """Where `main.py` lies.

    Raises: FileNotFoundError when the package was installed without it.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "_app", package.parent / "app"):
        if (folder / "main.py").is_file():
            return folder
    raise FileNotFoundError(f"expected the dashboard in {package / '_app'} or {package.parent / 'app'}, found neither")


def app_command(
    models: Sequence[str] = (), runs: str | None = None, port: int | None = None, headless: bool = False
) -> list[str]:
    """The command that serves the dashboard.

    Args: models: directories the page may open beside the bundled models; runs: folder of run folders to show.
    Raises: ValueError for something that is not a directory, or a port that is none.
    """
    for path in (*models, *([runs] if runs else [])):
        if not Path(path).is_dir():
            raise ValueError(f"expected a directory, found {path!r}")
    if port is not None and not 0 < port < 65536:
        raise ValueError(f"expected a port between 1 and 65535, found {port}")
    options = [
        "--server.address",
        ADDRESS,
        "--server.headless",
        str(headless).lower(),
        "--browser.gatherUsageStats",
        "false",
        "--runner.magicEnabled",  # we write through st.*; rewriting every page for "magic" cost a tenth of a click
        "false",
    ]
    if port is not None:
        options += ["--server.port", str(port)]
    own = [part for path in models for part in ("--model", str(Path(path).resolve()))]
    own += ["--runs", str(Path(runs).resolve())] if runs else []
    return [sys.executable, "-m", "streamlit", "run", str(app_directory() / "main.py"), *options, "--", *own]


def app_environment() -> dict[str, str]:
    """The environment of the server: it finds this very package, installed or not."""
    paths = [str(Path(__file__).resolve().parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    # One thread per forward: sessions are the parallelism here, and threads that wait for one another on a busy machine
    # made small models a hundred times slower.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    return environment


def run_app(
    models: Sequence[str] = (), port: int | None = None, headless: bool = False, runs: str | None = None
) -> int:
    """Serve the dashboard until it is stopped (interrupt or SIGTERM, which end the server too); its exit code.

    Raises: ValueError when Streamlit is not installed, or for options that cannot be; FileNotFoundError without the
        application.
    """
    if importlib.util.find_spec("streamlit") is None:
        raise ValueError("the dashboard needs Streamlit: pip install 'engram-interp[app]'")
    command = app_command(models, runs, port, headless)
    server = subprocess.Popen(command, env=app_environment())
    ours = threading.current_thread() is threading.main_thread()  # elsewhere Python takes no handlers
    before = signal.signal(signal.SIGTERM, lambda *_: server.terminate()) if ours else None
    try:
        return server.wait()
    except KeyboardInterrupt:
        server.terminate()
        return server.wait()
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
