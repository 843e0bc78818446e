"""What does Engram do inside this pair, next to the paper? Findings, evaluation and collisions gathered into one page.

`run_report` leaves a run folder with every table the page was made from and `report.html`, which needs nothing beside it. The page
says what the models are, and of each of the paper's claims: paper, here, null, rule, verdict. Cost on the bundled pair: about a
minute and a half of one core, most of it lens and similarity; `quick` takes every other sentence and fewer items.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from engram_interp.figures.memory import collision_figure
from engram_interp.figures.static_svg import static_svg
from engram_interp.figures.style import apply_style
from engram_interp.figures.token_strip import strip_data, strip_svg
from engram_interp.gallery import GallerySentence, load_gallery
from engram_interp.models.protocol import MemoryModel
from engram_interp.models.registry import BUNDLED, Pair
from engram_interp.probes.collisions import CollisionResult, slot_collisions
from engram_interp.probes.gates import read_gates
from engram_interp.probes.token_readings import LABELS, token_readings
from engram_interp.runs import texts_hash
from engram_interp.runs.atomic import write_atomically
from engram_interp.runs.folder import start_run
from engram_interp.runs.provenance import commit
from engram_interp.studies.evaluation import Evaluation, compare_evaluations, evaluate
from engram_interp.studies.findings import Findings, find, write_findings
from engram_interp.studies.gallery_loss import gallery_losses
from engram_interp.studies.report_page import Claim, Page

FILE = "report.html"
_SMALL = (
    "These are small models trained for this project. What this page says describes these checkpoints, not the published models of "
    "27 and 40 billion parameters; where it differs from the paper, that is a result about this scale."
)
_QUICK = (
    "This is the quick form, on half of the sentences and fewer items. A rule that is not met here may be met by all of them: it is not "
    "decided. The command without --quick decides it."
)


def run_report(
    pair: Pair,
    out: Path,
    *,
    data: Path | None = None,
    items: int = 400,
    seed: int = 0,
    quick: bool = False,
    pictures: Path | None = None,
    progress: bool = False,
) -> Path:
    """Make the report of a pair and its control in a run folder; returns the page.

    Args: data: evaluation data as `evaluate` takes it; None uses the bundled gallery and generated tasks. items: per task;
        quick: every other sentence, at most 100 items and 10 permutations, which the page says and which leave open what
        only the full sample can decide;
        pictures: a folder for the main figures as SVG files.
    Raises: RunError when the folder holds something else.
    """
    sentences, permutations = load_gallery(), 60
    if quick:
        sentences, items, permutations = _every_other(sentences), min(items, 100), 10
    models = {m.identity.name: m.identity.weights_sha256 for m in (pair.engram, pair.moe, pair.moe_control)}
    config: dict[str, object] = {"items": items, "permutations": permutations, "data": data is not None}
    texts = texts_hash(s.text for s in sentences)
    with start_run(out, study="report", config=config, seeds=[seed], models=models, texts_sha256=texts) as folder:
        found = find(pair, sentences, items=items, permutations=permutations, seed=seed, quick=quick)
        write_findings(folder, found)
        folder.write_table("gallery_loss", gallery_losses(pair, sentences, seed).table())
        evaluations = [
            evaluate(model, data, limit=items, articles=50, seed=seed, progress=progress)
            for model in (pair.engram, pair.moe, pair.moe_control)
        ]
        collisions = [
            slot_collisions(pair.engram, [s.text for s in sentences], block=block)
            for block in pair.engram.engram_layers
        ]
        for result in evaluations:
            folder.write_table(f"items.{result.model}", result.items)
            folder.write_text(f"{result.model}.json", json.dumps(result.as_dict(), indent=1))
        for result in collisions:
            table = result.table().astype({"head": str})  # numbers, and "all"
            folder.write_table(f"collisions.block{result.block}", table)
        page = build_page(pair, sentences, found, evaluations, collisions, config, quick=quick)
        folder.write_text(FILE, page.html())
    if pictures is not None:
        write_pictures(pictures, pair, found)
    return out / FILE


def write_pictures(folder: Path, pair: Pair, found: Findings) -> None:
    """The main figures as SVG files that stand alone: gates.svg, lens.svg, cka.svg, ablation.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    sentence = next(s for s in load_gallery() if s.category == "figure-7")
    ablation = apply_style(
        found.ablation.figure(), title="Retained above chance without the memory, and under controls"
    )
    drawn = {
        "gates": gate_strip(pair.engram, sentence, 720),
        "lens": static_svg(found.lens.figure(), "KL of the final prediction from every layer's", ground="#ffffff"),
        "cka": static_svg(found.cka.figure(), "CKA of all layers with soft alignment and its null", ground="#ffffff"),
        "ablation": static_svg(ablation, "Retained score under every removal and control", ground="#ffffff"),
    }
    for name, picture in drawn.items():
        write_atomically(folder / f"{name}.svg", lambda part, text=picture: part.write_text(text, encoding="utf-8"))


def build_page(
    pair: Pair,
    sentences: Sequence[GallerySentence],
    found: Findings,
    evaluations: Sequence[Evaluation],
    collisions: Sequence[CollisionResult],
    config: Mapping[str, object],
    *,
    quick: bool = False,
) -> Page:
    """The page of results that are there already."""
    models = (pair.engram, pair.moe, pair.moe_control)
    identities = "; ".join(f"{m.identity.name} {m.identity.weights_sha256[:12]}" for m in models)
    lead = [
        f"{pair.engram.identity.name} carries an Engram memory: a table of hashed n-gram embeddings, read by token ids alone and let "
        f"in through learned gates. It is compared with {pair.moe.identity.name}, a mixture of experts of the same size and work per "
        f"token, and every comparison with what {pair.moe_control.identity.name}, the same baseline from another seed, shows by chance.",
        *([_SMALL] if pair.engram.identity.name in BUNDLED else []),
        f"Weights: {identities}. Commit {commit() or 'none (installed package)'}. {len(sentences)} bundled sentences, "
        f"{config['items']} items a task at the most, {config['permutations']} permutations. Intervals are 95 % "
        "over sentences or items: they describe other texts for the same checkpoints, never another training.",
    ]
    page = Page("What does the memory do?", lead)
    _claims(page, found, quick)
    _gate_maps(page, pair, sentences)
    _findings_figures(page, found)
    _collision_part(page, collisions)
    _evaluation_part(page, evaluations)
    page.section(
        "How this can mislead",
        "A gate of 0.5 is no evidence, not half open; gates of different blocks and branches are not on one scale; the convolution "
        "is not gated, so a closed gate is not a silent memory. A lens reads middle layers in the last layer's language. Setting "
        "something to zero is a shock besides a removal: the controls of equal size stand beside it. One seed an arm: differences "
        "between checkpoints are differences between checkpoints.",
    )
    return page


def _claims(page: Page, found: Findings, quick: bool) -> None:
    page.section(
        "The paper's claims, here",
        "Each verdict follows from the rule beside it; the rule was written before the numbers.",
        *([_QUICK] if quick else []),
    )
    for row in found.rows:
        page.claim(Claim(row.claim, row.paper, row.here, row.null, row.rule, row.verdict))


def _gate_maps(page: Page, pair: Pair, sentences: Sequence[GallerySentence]) -> None:
    page.section(
        "When does the memory speak?",
        "The paper's own sentences and the first of every category. Word background: mean gate over the branches of the first "
        "memory; bars: its branches; rows below: every block and branch.",
    )
    chosen = [s for s in sentences if s.category == "figure-7"]
    first = {s.category: s for s in reversed(sentences) if s.category != "figure-7"}
    for sentence in [*chosen, *(first[name] for name in sorted(first))]:
        page.picture(partial(gate_strip, pair.engram, sentence), f"{sentence.text} ({sentence.category})")


def gate_strip(model: MemoryModel, sentence: GallerySentence, width: int) -> str:
    """The gates of a sentence as an SVG of a width in pixels."""
    gates = read_gates(model, sentence.text)
    r = token_readings(gates)
    data = strip_data(
        r.tokens, r.shown, r.bars, r.grid, r.labels, low=r.low, high=r.high, unit=LABELS["gate"], blocks=r.blocks,
        middle="no evidence",
    )  # fmt: skip
    return strip_svg(data, f"{gates.model}, {sentence.id}", width=width)


def _every_other(sentences: Sequence[GallerySentence]) -> tuple[GallerySentence, ...]:
    """Half of the gallery, the paper's own sentences included."""
    return tuple(s for i, s in enumerate(sentences) if i % 2 == 0 or s.category == "figure-7")


def _findings_figures(page: Page, found: Findings) -> None:
    page.section("Do gates open at names and set phrases?")
    page.figure(
        apply_style(found.gates.figure(), title="Mean gate by kind of token"),
        "Mean gate of every block and branch by kind of token, with intervals",
    )
    page.section("How early do predictions form?", found.lens.statement)
    lens, gap = found.lens.figure(), found.lens.difference_figure()
    page.figure(
        apply_style(lens, title="KL(final, layer) with simultaneous bands"),
        "KL of the final prediction from every layer's, both models, with bands",
    )
    page.figure(
        apply_style(gap, title="Difference, Engram minus baseline"),
        "Difference of the two curves with its simultaneous band",
    )
    page.section("Do shallow layers resemble deep ones?", *found.cka.warnings)
    page.figure(
        found.cka.figure(),
        "Unbiased CKA of every baseline layer with every Engram layer, with soft alignment and its null",
    )
    page.table(found.cka.depths(), folded="depths of every layer, with the null of the other seed")
    page.section(
        "What breaks without the memory?",
        "Change under every way to remove it, beside controls of equal size; a score that cannot be told from chance has no "
        "retained fraction.",
    )
    page.figure(
        apply_style(found.ablation.figure(), title="Retained above chance"),
        "Retained score of every task under every removal and control, with intervals",
    )
    table = found.ablation.table()
    keep = [
        c
        for c in (
            "task",
            "condition",
            "full",
            "ablated",
            "change_logprob",
            "change_logprob_low",
            "change_logprob_high",
            "retained_above_chance",
        )
        if c in table
    ]
    page.table(
        table.loc[~table["condition"].str.contains("@ block"), keep],
        "Change of log-probability in nats, all memories at once.",
        folded="numbers of every removal",
    )


def _collision_part(page: Page, collisions: Sequence[CollisionResult]) -> None:
    page.section(
        "Who shares a row?",
        "Distinct n-grams of the bundled sentences under the memory's own hash, beside what a uniform hash would give. A larger "
        "corpus collides more.",
    )
    for result in collisions:
        rows = result.table()
        page.figure(
            collision_figure(rows.query("head != 'all'"), title=f"block {result.block}"),
            f"Share of colliding n-grams in every head of block {result.block}, observed and expected",
        )
        page.table(
            rows.query("head == 'all'").dropna(axis="columns", how="all"),
            f"Block {result.block}: n-grams that share the rows of all heads with another.",
        )


def _evaluation_part(page: Page, evaluations: Sequence[Evaluation]) -> None:
    import pandas as pd

    page.section(
        "What do the models know?",
        *([] if "heldout_loss" in evaluations[0].scores else ["Bundled gallery and generated tasks only."]),
    )
    rows = []
    for name, first in evaluations[0].scores.items():
        row: dict[str, object] = {"task": name, "items": first.value.rows or first.value.n, "chance": first.chance}
        for evaluation in evaluations:
            value = evaluation.scores[name].value
            row[evaluation.model] = f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"
        rows.append(row)
    page.table(pd.DataFrame(rows), "Accuracy; facts by rank, held-out loss in nats per token.")
    for a, b in ((0, 1), (1, 2)):
        page.table(
            compare_evaluations(evaluations[a], evaluations[b]),
            f"{evaluations[a].model} minus {evaluations[b].model}, paired by item.",
            folded=f"{evaluations[a].model} minus {evaluations[b].model}",
        )
