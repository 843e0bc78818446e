"""`python -m experiments [RUNS]`: take in finished studies (default: runs/studies) and write README.md from all there are.

The tables of the project's README are written too: from the report of the bundled pair (`engram-interp report`, runs/report) and the
cards of the models.
"""

from __future__ import annotations

import sys
from pathlib import Path

from engram_interp.runs.atomic import write_atomically
from engram_interp.studies.pair_tables import keep_report, rewrite_readme
from engram_interp.studies.readme import collect_results, render_readme

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    taken = collect_results(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/studies"), here / "results")
    text = render_readme(here)
    write_atomically(here / "README.md", lambda part: part.write_text(text, encoding="utf-8"))
    print(f"results taken in: {', '.join(taken) or 'none'}")
    root = here.parent
    if (report := root / "runs" / "report").is_dir():
        keep_report(report, here / "results" / "pair.json")
    front = rewrite_readme(root)
    write_atomically(root / "README.md", lambda part: part.write_text(front, encoding="utf-8"))
