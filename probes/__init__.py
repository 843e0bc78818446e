"""Programs that ask one question of one model; the functions they call are in `engram_interp.probes`.

`from probes import logit_lens_kl` works in a checkout and gives the library's own function.
"""

from __future__ import annotations

from engram_interp import probes as _library

__all__ = _library.__all__


def __getattr__(name: str) -> object:
    return getattr(_library, name)
