"""What did a check find? One row per check, and a report that can be printed, tabulated or written as JSON."""

from __future__ import annotations

import json as json_format
import sys
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from engram_interp.runs import Provenance
from engram_interp.shapes import Shaped


@dataclass(frozen=True)
class CheckRow:
    """One check: what was expected, what was found."""

    check: str
    expected: str
    found: str
    ok: bool

    @property
    def line(self) -> str:
        """The row as one line of text."""
        if self.ok:
            return f"ok    {self.check}: {self.found}"
        return f"WRONG {self.check}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True)
class CheckReport:
    """Every check of one model."""

    model: str
    rows: tuple[CheckRow, ...]
    provenance: Provenance

    @property
    def ok(self) -> bool:
        """Whether all of them hold."""
        return all(row.ok for row in self.rows)

    def table(self):  # noqa: ANN201 - pandas is imported here only
        """One row per check."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.rows], columns=["check", "expected", "found", "ok"])

    def say(self, *, json: bool = False) -> int:
        """Print one line per check, or the report as JSON; 0 when all hold, else 1."""
        if json:
            sys.stdout.write(json_format.dumps(self.as_dict(), allow_nan=False) + "\n")
        else:
            say = _speaker()
            for row in self.rows:
                say(row.line)
            say(f"{self.model}: {sum(row.ok for row in self.rows)} of {len(self.rows)} checks hold")
        return 0 if self.ok else 1

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        rows = [asdict(row) for row in self.rows]
        return {"model": self.model, "ok": self.ok, "checks": rows, "provenance": self.provenance.as_dict()}


def say_error(error: Exception, *, json: bool = False) -> int:
    """Print why nothing could be checked; always 1."""
    if json:
        sys.stdout.write(json_format.dumps({"ok": False, "error": str(error)}) + "\n")
    else:
        _speaker()(f"error: {error}")
    return 1


def worst_element(
    expected: Shaped[np.ndarray, "..."], found: Shaped[np.ndarray, "..."]
) -> tuple[float, tuple[int, ...]]:
    """The largest absolute difference of two arrays of one shape, and where; not-a-number counts as infinite."""
    if not expected.size:
        return 0.0, ()
    difference = np.abs(expected.astype(np.float64) - found.astype(np.float64))
    difference = np.where((expected != found) & (difference == 0), 1.0, difference)  # integers beyond 2^53
    difference = np.where(np.isnan(difference), np.inf, difference)
    index = tuple(int(i) for i in np.unravel_index(np.argmax(difference), difference.shape))
    return float(difference[index]), index


def _speaker():  # noqa: ANN202 - rich's print, bound
    from rich.console import Console

    return partial(Console().print, markup=False, highlight=False, soft_wrap=True)
