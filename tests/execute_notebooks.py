"""Execute programs as notebooks: `python execute_notebooks.py OUT PROGRAM...` writes OUT/NAME.ipynb with the outputs.

One kernel serves all of them, and each starts with an empty namespace: importing torch takes seconds. A process of its own, because
Jupyter's client leaves sockets to the garbage collector, which the tests count as an error.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jupytext
import nbformat
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

_PATIENCE = 600  # seconds for one cell: nothing is measured here, and a busy machine is no failure


def execute(out: Path, programs: list[Path]) -> None:
    """The notebooks, in order; a cell that fails ends the process with its traceback."""
    manager = KernelManager(kernel_name="python3")
    manager.kernel_cmd = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    manager.start_kernel(cwd=str(out), env=os.environ | {"IPYTHONDIR": str(out / "ipython")})
    try:
        for program in programs:
            notebook = jupytext.read(program)
            nbformat.validate(notebook)
            executed = NotebookClient(notebook, km=manager, timeout=_PATIENCE).execute()
            nbformat.write(executed, out / f"{program.stem}.ipynb")
            reset = jupytext.reads("# %%\n%reset -f\n", fmt="py:percent")
            NotebookClient(reset, km=manager, timeout=_PATIENCE).execute()
    finally:
        manager.shutdown_kernel(now=True)


if __name__ == "__main__":
    execute(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
