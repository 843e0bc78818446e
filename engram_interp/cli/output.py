"""What the commands share: the application they join, how a model is named, what is printed and written."""

from __future__ import annotations

import math
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

    print(json.dumps(_finite(value), allow_nan=False))


def _finite(value: object) -> object:
    """JSON has no NaN: a number that could not be estimated becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


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
    if out is None:
        return
    if out.suffix == ".html":
        result.figure().write_html(out, include_plotlyjs=True)
    elif out.suffix == ".csv":
        result.table().to_csv(out, index=False)
    else:
        raise ValueError(f"expected a file ending in .html or .csv, found {out.name!r}")
