"""How is a text too long for an address shared? It is kept under the hash of its content, which the address carries."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import quote

IN_ADDRESS = 6000  # percent-encoded characters; proxies commonly stop near 8 kB
_KEPT = 500
_DIGEST = re.compile(r"[0-9a-f]{32}")


def fits_address(text: str) -> bool:
    """Whether the text itself can be part of a link."""
    return len(quote(text)) <= IN_ADDRESS


def remember(text: str) -> str:
    """Keep a text on this machine and return its name; the oldest beyond 500 are dropped."""
    name, folder = hashlib.sha256(text.encode()).hexdigest()[:32], _folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)
        for old in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime)[:-_KEPT]:
            old.unlink(missing_ok=True)
    return name


def recall(name: str) -> str | None:
    """The text of a name, None where this machine does not have it."""
    path = _folder() / name
    return path.read_text(encoding="utf-8") if _DIGEST.fullmatch(name) and path.is_file() else None


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "engram-interp" / "texts"
