"""Commands over several questions: demo, findings, report, bench, the dashboard, tables and run folders."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

from tyro.conf import Positional, UseAppendAction

from engram_interp.cli.output import app, show, show_json


@app.command
def demo(
    *,
    text: str = "Only Alexander the Great could tame the horse Bucephalus.",
    out: Path = Path("runs/demo"),
) -> int:
    """Show the bundled pair in a minute or two: gates of a sentence, every model's loss, and a quick report.

    Args:
        text: The sentence whose gates are shown first.
        out: The run folder of the report.
    """
    from engram_interp.demo import run_demo

    return run_demo(text, out)


@app.command
def findings(
    *, pair: str = "mini", out: Path = Path("runs/findings"), items: int = 400, seed: int = 0, json: bool = False
) -> int:
    """Ask the paper's questions of a pair: paper, here, null, rule and verdict, kept as a run folder.

    Args:
        pair: A bundled pair.
        out: The run folder to write.
        items: Items per ablation task at the most.
        seed: Seed of everything drawn.
        json: Print the table as JSON.
    """
    from engram_interp.models.registry import load_pair
    from engram_interp.studies.findings import run_findings

    found = run_findings(load_pair(pair), out, items=items, seed=seed)
    if json:
        show_json([vars(row) for row in found.rows])
        return 0
    for row in found.rows:
        show(
            f"{row.verdict.upper()}: {row.claim}",
            *(f"  {k:6}{getattr(row, k)}" for k in ("paper", "here", "null", "rule")),
        )
    show(f"run folder: {out}")
    return 0


@app.command
def report(
    *,
    pair: str = "mini",
    engram: str | None = None,
    baseline: str | None = None,
    control: str | None = None,
    data: Path | None = None,
    items: int = 400,
    seed: int = 0,
    quick: bool = False,
    pictures: Path | None = None,
    out: Path = Path("runs/report"),
) -> int:
    """Write one self-contained page that shows what the memory of a pair does, next to the paper.

    Args:
        pair: A bundled pair.
        engram: A model directory instead, with its baseline and the baseline's other seed.
        baseline: The baseline of `engram`.
        control: The baseline from another seed: the null of every comparison.
        data: Evaluation data; the bundled gallery if absent.
        items: Items per task at the most.
        seed: Seed of everything drawn.
        quick: Half of the sentences, fewer items and permutations.
        pictures: Also write the main figures as SVG files into this folder.
        out: The run folder to write; the page is report.html in it.
    """
    from engram_interp.models.registry import Pair, load, load_pair
    from engram_interp.studies.report import run_report

    given = (engram, baseline, control)
    if any(given) and not all(given):
        raise ValueError("expected --engram, --baseline and --control together: without another seed there is no null")
    models = Pair(*(load(name) for name in given if name)) if all(given) else load_pair(pair)
    page = run_report(
        models, out, data=data, items=items, seed=seed, quick=quick, pictures=pictures, progress=sys.stderr.isatty()
    )
    show(f"report: {page}", "dashboard: engram-interp app")
    return 0


@app.command
def bench(
    model: Positional[str | None] = None,
    *,
    group: tuple[Literal["forward", "vocabulary", "cka", "ngram", "peers"], ...] = (
        "forward",
        "vocabulary",
        "cka",
        "ngram",
        "peers",
    ),
    rounds: int = 5,
    threads: tuple[int, ...] = (),
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Time the probes beside the arithmetic they need, interleaved, on one thread and on all.

    Args:
        model: A bundled name or a checkpoint directory for the forward group; without it a random model of 12 blocks.
        group: What to time.
        rounds: Interleaved repetitions, more where they take milliseconds; a line per row goes to standard error.
        threads: Numbers of threads; without it one, and all.
        out: Run folder; without it one named by the time below runs/bench.
        json: Print the ratios as JSON.
    """
    from datetime import UTC, datetime

    from engram_interp.models.registry import load
    from engram_interp.studies.bench import run_bench

    folder = out or Path("runs/bench") / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    counts = threads or sorted({1, len(os.sched_getaffinity(0))})
    table = run_bench(
        group, load(model) if model else None, folder, rounds=rounds, threads=counts,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    if json:
        show_json({"run": str(folder), "rows": table.to_dict("records")})
    else:
        table["error"] = table["error"].map(lambda x: "" if x != x else f"{x:.0e}")
        show(table.to_string(index=False, float_format="%.3f", na_rep=""), f"run folder: {folder}")
    return 0


@app.command(name="app")
def dashboard(
    *,
    model: UseAppendAction[tuple[Path, ...]] = (),
    runs: Path | None = None,
    port: int | None = None,
    headless: bool = False,
) -> int:
    """Open the dashboard on the bundled models, and on the directories named here.

    Args:
        model: A model directory the page may open besides; once per model.
        runs: A folder of run folders to show.
        port: Port to serve on.
        headless: Do not open a browser.
    """
    from engram_interp.app_launcher import run_app

    return run_app([str(path) for path in model], port, headless, str(runs) if runs else None)


@app.command
def memory() -> int:
    """Read the table itself: lookup, collisions, access, rows, neighbours, read, diff."""
    raise ValueError("expected `engram-interp memory ACTION PATH ...`; see `engram-interp memory --help`")


@app.command
def runs() -> int:
    """Look at run folders: list, show, table."""
    raise ValueError("expected `engram-interp runs list|show|table PATH`; see `engram-interp runs --help`")
