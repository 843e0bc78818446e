"""What does a run folder say about itself? A strict, versioned `manifest.json`; docs/run_folder.md lists its keys."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engram_interp.runs.atomic import write_atomically

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
Status = Literal["running", "done", "failed", "cancelled"]


class RunError(ValueError):
    """A run folder that cannot be used; the message says what was expected and what was found."""


class Manifest(BaseModel):
    """Everything needed to get the numbers again. `tables`: rows of each; `models`: weights hash of each."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    study: str
    config: dict[str, object]
    command: str
    versions: dict[str, str]
    commit: str
    models: dict[str, str]
    texts_sha256: str
    seeds: list[int]
    status: Status
    error: str = ""
    started: str
    finished: str = ""
    tables: dict[str, int] = Field(default_factory=dict)
    tensors: list[str] = Field(default_factory=list)


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_manifest(path: Path) -> Manifest:
    """The manifest of a run folder.

    Raises: RunError when it is missing, not JSON, of another version, or has missing, unknown or ill-typed keys.
    """
    file = path / MANIFEST
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path}: not a run folder, {MANIFEST} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(f"{file}: not readable as JSON ({error})") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise RunError(
            f"{file}: expected schema version {SCHEMA_VERSION}, found {version}: written by a newer engram-interp; upgrade to read it"
        )
    if version != SCHEMA_VERSION:
        raise RunError(f"{file}: expected schema version {SCHEMA_VERSION}, found {version!r}")
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RunError(f"{file}: {problems}") from None


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Put a manifest in place, atomically."""
    text = manifest.model_dump_json(indent=2)
    write_atomically(path / MANIFEST, lambda part: part.write_text(text, encoding="utf-8"))
