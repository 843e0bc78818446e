"""Where do the results of a study live, and how does a killed run go on?

    RUN/manifest.json              what was run, from what, and whether it finished
    RUN/shards/TABLE/SHARD.parquet one finished piece of work each; a file is there whole or not at all
    RUN/tables/TABLE.parquet       all pieces of a table in order, written when the run is done
    RUN/tensors/NAME.safetensors

A run is a list of shards, each a function of the configuration and the seed alone. Killed at any moment and started
again with the same configuration, it skips the shards that exist and ends with the same bytes in every table. Misleads:
the manifest of a run killed with SIGKILL still says "running".
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engram_interp.runs.atomic import write_atomically
from engram_interp.runs.manifest import MANIFEST, Manifest, RunError, now, read_manifest, write_manifest
from engram_interp.runs.provenance import command, commit, versions

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]*")


class RunFolder:
    """A run that is being written. Make one with `start_run`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    def done_shards(self, table: str) -> list[str]:
        """Names of the finished pieces of a table, sorted."""
        folder = self.path / "shards" / _checked(table)
        return sorted(file.stem for file in folder.glob("*.parquet")) if folder.is_dir() else []

    def write_shard(self, table: str, shard: str, frame: pd.DataFrame) -> None:
        """Put one finished piece in place, atomically."""
        folder = self.path / "shards" / _checked(table)
        folder.mkdir(parents=True, exist_ok=True)
        _write_parquet(folder / f"{_checked(shard)}.parquet", frame)

    def read_shard(self, table: str, shard: str) -> pd.DataFrame:
        """One finished piece.

        Raises: RunError when it is missing or damaged.
        """
        return _read_piece(self.path / "shards" / _checked(table) / f"{_checked(shard)}.parquet")

    def write_table(self, table: str, frame: pd.DataFrame) -> None:
        """Put a whole table in place and count its rows in the manifest."""
        folder = self.path / "tables"
        folder.mkdir(exist_ok=True)
        _write_parquet(folder / f"{_checked(table)}.parquet", frame)
        self._update(tables={**self.manifest.tables, table: len(frame)})

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Put a safetensors file in place."""
        from safetensors.torch import save_file

        folder = self.path / "tensors"
        folder.mkdir(exist_ok=True)
        contiguous = {key: value.detach().contiguous() for key, value in tensors.items()}
        write_atomically(folder / f"{_checked(name)}.safetensors", lambda part: save_file(contiguous, part, metadata))
        self._update(tensors=sorted({*self.manifest.tensors, name}))

    def write_text(self, name: str, text: str) -> None:
        """Put a text file (a figure as HTML, a report) in place."""
        write_atomically(self.path / _checked(name), lambda part: part.write_text(text, encoding="utf-8"))

    def gather(self, table: str, shards: Sequence[str]) -> pd.DataFrame:
        """Join the pieces of a table in the given order and write the whole.

        Raises: RunError when a piece is missing or damaged.
        """
        import pandas as pd

        if missing := sorted(set(shards) - set(self.done_shards(table))):
            raise RunError(f"{self.path}: table {table!r} lacks {len(missing)} pieces, the first is {missing[0]!r}")
        frame = pd.concat([self.read_shard(table, shard) for shard in shards], ignore_index=True)
        self.write_table(table, frame)
        return frame

    def finish(self, status: str = "done", error: str = "") -> None:
        """Record how the run ended."""
        self._update(status=status, error=error, finished=now())

    def _update(self, **changes: object) -> None:
        self.manifest = self.manifest.model_copy(update=changes)
        write_manifest(self.path, self.manifest)


@contextmanager
def start_run(
    path: Path,
    *,
    study: str,
    config: dict[str, object],
    seeds: Sequence[int],
    models: Mapping[str, str],
    texts_sha256: str,
) -> Iterator[RunFolder]:
    """Start a run, or go on with one: one that was stopped, or a finished one that is given more seeds after its own
    (of the same texts: a study whose items are drawn by seed reads others). Records done, failed or cancelled on the way out.

    Raises: RunError when the folder holds something else, or a run of another configuration, model, text, seed or
        software version.
    """
    fresh = Manifest(
        study=study, config=config, command=command(), versions=versions(), commit=commit(), models=dict(models),
        texts_sha256=texts_sha256, seeds=list(seeds), status="running", started=now(),
    )  # fmt: skip
    if path.exists() and any(path.iterdir()):
        fresh = _continued(path, fresh)
    path.mkdir(parents=True, exist_ok=True)
    run = RunFolder(path, fresh)
    run._update()
    try:
        yield run
    except KeyboardInterrupt:
        run.finish("cancelled", "interrupted")
        raise
    except BaseException as error:
        run.finish("failed", f"{type(error).__name__}: {error}")
        raise
    run.finish()


def _continued(path: Path, fresh: Manifest) -> Manifest:
    old = read_manifest(path)
    for key in ("study", "config", "models", "texts_sha256", "seeds", "versions"):
        was, wanted = getattr(old, key), getattr(fresh, key)
        more_seeds = key == "seeds" and wanted[: len(was)] == was
        if was != wanted and not more_seeds:
            raise RunError(
                f"{path}: holds a run with another {key} (expected {wanted}, found {was}); to have it made again delete it (rm -r "
                f"{shlex.quote(str(path))}), or keep it and name another folder with --out"
            )
    return fresh.model_copy(update={"started": old.started, "tables": old.tables, "tensors": old.tensors})


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise RunError(f"expected a name of letters, digits and _.+=-, found {name!r}")
    return name


def _read_piece(file: Path) -> pd.DataFrame:
    import pandas as pd
    from pyarrow import ArrowException

    try:
        return pd.read_parquet(file)
    except (OSError, ArrowException) as error:
        raise RunError(f"{file}: damaged ({error}); delete it to have it made again") from None


def _write_parquet(path: Path, frame: pd.DataFrame) -> None:
    write_atomically(path, lambda part: frame.to_parquet(part, index=False))


@dataclass(frozen=True)
class OpenRun:
    """A run opened for reading."""

    path: Path
    manifest: Manifest

    def table(self, name: str) -> pd.DataFrame:
        """A finished table.

        Raises: RunError naming the tables there are.
        """
        import pandas as pd

        if name not in self.manifest.tables:
            raise RunError(f"{self.path}: no table {name!r}; tables: {', '.join(self.manifest.tables) or 'none'}")
        return pd.read_parquet(self.path / "tables" / f"{name}.parquet")


def open_run(path: Path) -> OpenRun:
    """Open a run folder and check that everything its manifest names is there and whole.

    Raises: RunError with the reason.
    """
    manifest = read_manifest(path)
    for name, rows in manifest.tables.items():
        _check_table(path / "tables" / f"{_checked(name)}.parquet", rows)
    for name in manifest.tensors:
        _check_tensors(path / "tensors" / f"{_checked(name)}.safetensors")
    return OpenRun(path, manifest)


def _check_table(file: Path, rows: int) -> None:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    try:
        found = parquet.read_metadata(file).num_rows
    except (OSError, ArrowException) as error:
        raise RunError(f"{file}: table missing or damaged ({error})") from None
    if found != rows:
        raise RunError(f"{file}: the manifest says {rows} rows, the file holds {found}")


def _check_tensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            opened.keys()
    except (OSError, SafetensorError) as error:
        raise RunError(f"{file}: tensors missing or damaged ({error})") from None


@dataclass(frozen=True)
class RunSummary:
    """One line of a list of runs; a folder that cannot be opened has status "broken" and says why."""

    name: str
    path: Path
    status: str
    reason: str = ""
    study: str = ""
    started: str = ""
    seeds: tuple[int, ...] = ()
    tables: tuple[str, ...] = ()


def list_runs(root: Path) -> list[RunSummary]:
    """Every folder under `root` that is or should be a run (has a manifest, tables or shards), by name.

    Raises: RunError when `root` is not a folder.
    """
    if not root.is_dir():
        raise RunError(f"{root}: no such folder")
    candidates = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [_summary(path) for path in candidates if _looks_like_run(path)]


def _looks_like_run(path: Path) -> bool:
    """Anything but a folder that only groups other folders, or one of another program; one that cannot be read, too."""
    try:
        return any((path / part).exists() for part in (MANIFEST, "tables", "shards")) or not any(path.iterdir())
    except OSError:
        return True


def _summary(path: Path) -> RunSummary:
    try:
        m = open_run(path).manifest
    except Exception as error:  # noqa: BLE001 - a broken folder must never break the list
        return RunSummary(path.name, path, "broken", f"{error}")
    return RunSummary(path.name, path, m.status, m.error, m.study, m.started, tuple(m.seeds), tuple(m.tables))
