"""`python -m experiments [RUNS]`: take in finished studies (default: runs/studies) and write README.md from all there are."""

from __future__ import annotations

import sys
from pathlib import Path

from engram_interp.runs.atomic import write_atomically
from engram_interp.studies.readme import collect_results, render_readme

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    taken = collect_results(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/studies"), here / "results")
    text = render_readme(here)
    write_atomically(here / "README.md", lambda part: part.write_text(text, encoding="utf-8"))
    print(f"results taken in: {', '.join(taken) or 'none'}")
