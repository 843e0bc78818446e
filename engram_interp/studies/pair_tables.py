"""The two result tables of the project's README, written from results and never by hand.

`keep_report` keeps of a report's run folder what the tables need (`experiments/results/pair.json`); the scores come from
the cards in `checkpoints/`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from engram_interp.models.registry import BUNDLED
from engram_interp.runs.atomic import write_atomically
from engram_interp.runs.folder import open_run
from engram_interp.studies.marked_page import replace_marked

KEPT = Path("experiments/results/pair.json")
_QUESTIONS = {
    "phrase_entity": "last word of a name",
    "phrase_generic": "last word of a set phrase",
    "context_copy": "copying a rare pair from the context",
    "lre": "facts by rank among the relation's objects (chance 0.5)",
    "heldout_loss": "loss on held-out articles, nats per token",
}
_SCORE = re.compile(r"^\| (\w+) \| (\S+) \[(\S+), (\S+)\] \|[^|]*\|[^|]*\| (\d+) \|", re.MULTILINE)


def keep_report(run: Path, file: Path) -> None:
    """Keep findings and losses of a finished report.

    Raises: RunError or ValueError when the run is damaged, unfinished or of another study.
    """
    opened = open_run(run)
    m = opened.manifest
    if m.study != "report" or m.status != "done":
        raise ValueError(f"{run}: expected a finished report, found study {m.study!r} with status {m.status!r}")
    kept = {
        **m.model_dump(include={"models", "texts_sha256", "config", "commit", "finished"}),
        "findings": opened.table("findings").to_dict("records"),
        "gallery_loss": opened.table("gallery_loss").to_dict("records"),
    }
    file.parent.mkdir(exist_ok=True)
    text = json.dumps(kept, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomically(file, lambda part: part.write_text(text, encoding="utf-8"))


def rewrite_readme(root: Path) -> str:
    """The README of a checkout with both tables as the results say.

    Raises: ValueError when a marker, or a score in a card, is missing.
    """
    kept = json.loads((root / KEPT).read_text(encoding="utf-8"))
    text = (root / "README.md").read_text(encoding="utf-8")
    cards = {name: (root / "checkpoints" / name / "README.md").read_text(encoding="utf-8") for name in BUNDLED}
    text = replace_marked(text, "scores", scores_table(cards, kept))
    return replace_marked(text, "findings", findings_table(kept))


def scores_table(cards: dict[str, str], kept: dict) -> str:
    """What the models know: a row per question, a column per model."""
    found = {model: {m[1]: m for m in _SCORE.finditer(card)} for model, card in cards.items()}
    lines = [f"| question | {' | '.join(cards)} |", "|---" * (len(cards) + 1) + "|"]
    for task, question in _QUESTIONS.items():
        if missing := [model for model in cards if task not in found[model]]:
            raise ValueError(f"expected a score for {task} in the cards, found none in {missing}")
        rows = [found[model][task] for model in cards]
        cells = (f"{m[2]} [{m[3]}, {m[4]}]" for m in rows)
        unit = "articles" if task == "heldout_loss" else "items"
        lines.append(f"| {question}, {rows[0][5]} {unit} | {' | '.join(cells)} |")
    losses = {row["model"]: f"{row['loss']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" for row in kept["gallery_loss"]}
    lines.append(f"| loss on the bundled sentences, nats per token | {' | '.join(losses[model] for model in cards)} |")
    return "\n".join(lines) + "\n"


def findings_table(kept: dict) -> str:
    """The paper's claims: here, null, verdict."""
    lines = ["| claim | here | null | verdict |", "|---|---|---|---|"]
    for row in kept["findings"]:
        cells = (row[key].replace("||", "‖").replace("|", "\\|") for key in ("claim", "here", "null", "verdict"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
