"""Where does a number come from? Everything needed to get it again, attached to every result."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Provenance:
    """Models (name to weights hash), texts (hash and count), options, software, and when."""

    models: Mapping[str, str]
    texts_sha256: str
    texts: int
    options: Mapping[str, object]
    versions: Mapping[str, str] = field(default_factory=lambda: versions())
    commit: str = field(default_factory=lambda: commit())
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


def texts_hash(texts: Iterable[str]) -> str:
    """SHA-256 over the texts, each ended by a zero byte."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


@lru_cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose numbers matter."""
    packages = ("engram-interp", "torch", "transformer-lens", "numpy", "scipy", "tokenizers")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@lru_cache
def commit() -> str:
    """The checkout's commit, with `+dirty` if files differ; "" outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""

    def git(*arguments: str) -> str:
        done = subprocess.run(("git", "-C", str(root), *arguments), capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def command() -> str:
    """The command line of this process, without the directory of the program."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
