"""What the commands share: the application they join, how a model is named, what is printed and written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import arg

app = tyro.extras.SubcommandApp()

Model = Annotated[str, arg(help="a bundled name (see `engram-interp models`), a model directory or a GGUF file")]
Base = Annotated[Path | None, arg(help="the base model of an engram-peft adapter: a directory or a GGUF file")]


def show(*lines: object) -> None:
    """Print one line each."""
    print(*lines, sep="\n")


def show_json(value: object) -> None:
    """Print a value as JSON."""
    import json

    from engram_interp.runs.result_files import finite

    print(json.dumps(finite(value), allow_nan=False))


def read_corpus(path: Path | None) -> list:
    """The texts of a file, or the bundled gallery with its marked entities.

    Raises: ValueError when the file holds no text.
    """
    from engram_interp.gallery import load_gallery
    from engram_interp.gallery.files import read_texts

    texts = list(load_gallery()) if path is None else list(read_texts(path))
    if not texts:
        raise ValueError(f"{path}: expected at least one text, found an empty file")
    return texts


def write_result(result: Any, out: Path | None) -> None:
    """Write a result's figure or table, by the suffix."""
    from engram_interp.runs.result_files import write_form

    if out is not None:
        write_form(
            out,
            {
                ".html": lambda: result.figure().to_html(include_plotlyjs=True),
                ".csv": lambda: result.table().to_csv(index=False),
            },
        )
