"""How does a result become a file or a line of JSON, whichever command it came from?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from engram_interp.runs.atomic import write_atomically


def write_form(out: Path, forms: Mapping[str, Callable[[], str]]) -> None:
    """Write one of the forms of a result, chosen by the suffix of the file; only that one is made.

    Raises: ValueError for a suffix that is not among `forms`.
    """
    if out.suffix not in forms:
        raise ValueError(f"expected a file ending in {', '.join(forms)}, found {out.name!r}")
    content = forms[out.suffix]()
    write_atomically(out, lambda part: part.write_text(content, encoding="utf-8"))


def finite(value: object) -> object:
    """The value with null where a number could not be estimated: JSON has neither NaN nor infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value
