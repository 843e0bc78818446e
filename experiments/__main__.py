"""`python -m experiments`: write README.md from the studies."""

from __future__ import annotations

from pathlib import Path

from engram_interp.runs.atomic import write_atomically
from engram_interp.studies.readme import render_readme

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    text = render_readme(here)
    write_atomically(here / "README.md", lambda part: part.write_text(text, encoding="utf-8"))
