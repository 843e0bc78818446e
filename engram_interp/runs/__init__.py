"""Run folders and provenance: what was computed, from what, and with what result."""

from engram_interp.runs.provenance import Provenance as Provenance
from engram_interp.runs.provenance import texts_hash as texts_hash

_LAZY = {
    "OpenRun": "folder",
    "RunFolder": "folder",
    "RunSummary": "folder",
    "list_runs": "folder",
    "open_run": "folder",
    "start_run": "folder",
    "RunError": "manifest",
}


def __getattr__(name: str) -> object:
    """Run folders are loaded on first use: most results need provenance alone."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
