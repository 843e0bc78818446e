"""How does one program show its tables and figures, both in a terminal and in a notebook?

In a notebook they are displayed under their cell. In a terminal a table is printed and a figure is written as a page,
`<folder>/<name>.html`, whose path is printed; the folder is `runs/figures` below the working directory, or what the
environment variable ENGRAM_FIGURES names. The plotting library lies once beside the pages, so they open offline and
are small; move them together.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from engram_interp.runs.atomic import write_atomically

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

FOLDER = Path("runs/figures")
_LIBRARY = "plotly.min.js"


def show_table(table: pd.DataFrame, *, rows: int = 20) -> None:
    """Show the first rows of a table.

    Args: rows: at most so many; the number of those left out is printed.
    """
    if in_notebook():
        _display(table.head(rows))
    else:
        print(table.head(rows).to_string(index=False, float_format=lambda x: f"{x:.3g}"))
    if len(table) > rows:
        print(f"... and {len(table) - rows} more rows")


def show_figure(figure: go.Figure, name: str) -> None:
    """Show a figure; `name` is that of its file when there is no notebook to show it in."""
    if in_notebook():
        _display(figure)
        return
    folder = Path(os.environ.get("ENGRAM_FIGURES", FOLDER))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _LIBRARY).exists():
        from plotly.offline import get_plotlyjs

        write_atomically(folder / _LIBRARY, lambda part: part.write_text(get_plotlyjs(), encoding="utf-8"))
    page = figure.to_html(include_plotlyjs="directory", full_html=True)
    write_atomically(folder / f"{name}.html", lambda part: part.write_text(page, encoding="utf-8"))
    print(f"figure: {folder / f'{name}.html'}")


def in_notebook() -> bool:
    """Whether a notebook's kernel runs this program (a terminal's IPython is not one)."""
    shell = sys.modules.get("IPython")
    running = shell.get_ipython() if shell else None
    return running is not None and running.has_trait("kernel")


def _display(value: object) -> None:
    from IPython.display import display

    display(value)
