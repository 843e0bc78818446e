"""What Engram is: compressed vocabulary, n-gram hash, multi-head table, and the module that reads them.

Names are imported on first use, so that reading rows of a table file needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engram_interp.memory.compress import CompressedVocabulary as CompressedVocabulary
    from engram_interp.memory.engram import Engram as Engram
    from engram_interp.memory.engram import EngramOptions as EngramOptions
    from engram_interp.memory.engram import EngramState as EngramState
    from engram_interp.memory.engram import gate_of_score as gate_of_score
    from engram_interp.memory.hashing import NgramHash as NgramHash
    from engram_interp.memory.hashing import assign_primes as assign_primes
    from engram_interp.memory.hashing import pcg64_multipliers as pcg64_multipliers
    from engram_interp.memory.hashing import splitmix64_multipliers as splitmix64_multipliers
    from engram_interp.memory.table import MultiHeadTable as MultiHeadTable

_LAZY = {
    "CompressedVocabulary": "compress",
    "Engram": "engram",
    "EngramOptions": "engram",
    "EngramState": "engram",
    "MultiHeadTable": "table",
    "NgramHash": "hashing",
    "assign_primes": "hashing",
    "gate_of_score": "engram",
    "pcg64_multipliers": "hashing",
    "splitmix64_multipliers": "hashing",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
