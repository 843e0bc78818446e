"""`engram-interp runs list|show|table`: look at run folders from a terminal."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from engram_interp.runs.folder import list_runs, open_run

Json = Annotated[bool, arg(name="json", help="print JSON")]


def run_list(root: Positional[Path], *, as_json: Json = False) -> int:
    """Print every run under `root`, broken ones with their reason.

    Raises: RunError when `root` is not a folder.
    """
    runs = list_runs(root)
    if as_json:
        print(json.dumps([{**asdict(run), "path": str(run.path)} for run in runs], indent=2))
        return 0
    for run in runs:
        seeds = ",".join(map(str, run.seeds)) or "-"
        print(
            f"{run.name:32} {run.status:10} {run.study:22} seeds {seeds:8} {run.started or '-':26} {run.reason}".strip()
        )
    if not runs:
        print(f"no runs in {root}", file=sys.stderr)
    return 0


def run_show(path: Positional[Path], *, as_json: Json = False) -> int:
    """Print the manifest of one run.

    Raises: RunError with the reason when the folder is broken.
    """
    manifest = open_run(path).manifest
    if as_json:
        print(manifest.model_dump_json(indent=2))
        return 0
    for key, value in manifest.model_dump().items():
        print(f"{key:15} {json.dumps(value) if isinstance(value, dict | list) else value}")
    return 0


def run_table(path: Positional[Path], name: Positional[str], *, as_json: Json = False, out: Path | None = None) -> int:
    """Print a table of a run, or write it to a CSV, JSON or parquet file by its ending.

    Raises: RunError for a broken run or an unknown table; ValueError for another ending.
    """
    frame = open_run(path).table(name)
    if out is None:
        print(frame.to_json(orient="records", indent=2) if as_json else frame.to_string(index=False))
        return 0
    if out.suffix == ".csv":
        frame.to_csv(out, index=False)
    elif out.suffix == ".json":
        frame.to_json(out, orient="records", indent=2)
    elif out.suffix == ".parquet":
        frame.to_parquet(out, index=False)
    else:
        raise ValueError(f"expected a file ending in .csv, .json or .parquet, found {out.name!r}")
    return 0
