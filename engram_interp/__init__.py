"""engram_interp: look inside language models that carry an Engram memory.

    >>> import engram_interp
    >>> pair = engram_interp.load_pair("mini")
    >>> gates = engram_interp.probes.read_gates(pair.engram, "Only Alexander the Great could tame Bucephalus.")
    >>> gates.table().columns.tolist()
    ['position', 'token', 'layer', 'branch', 'gate', 'score', 'write_norm', 'hidden_norm']

Everything is imported on first use, so importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from engram_interp import memory as memory
    from engram_interp import probes as probes
    from engram_interp.hooks import ablate as ablate
    from engram_interp.models.registry import Pair as Pair
    from engram_interp.models.registry import load as load
    from engram_interp.models.registry import load_pair as load_pair

_LAZY = {
    "Pair": "engram_interp.models.registry",
    "ablate": "engram_interp.hooks",
    "load": "engram_interp.models.registry",
    "load_pair": "engram_interp.models.registry",
}
_MODULES = ("figures", "hooks", "kernels", "measure", "memory", "models", "probes", "runs", "training")


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_MODULES])
