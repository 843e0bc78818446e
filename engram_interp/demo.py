"""The three-minute look: where does the memory of the bundled model speak, does it help, and the report of the pair.

Cost: about a minute of one core, nearly all of it the quick form of the report (every other sentence, fewer items).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from engram_interp.gallery import GallerySentence, load_gallery
from engram_interp.measure.statistics import Estimate, mean_interval, paired_difference
from engram_interp.models.protocol import Decoder
from engram_interp.models.registry import Pair, load_pair


@dataclass(frozen=True)
class GalleryLosses:
    """Mean next-token loss on the gallery, nats per token, sentences as the units; differences are paired by sentence."""

    losses: dict[str, Estimate]
    engram_minus_moe: Estimate
    moe_minus_control: Estimate


def sentence_losses(model: Decoder, texts: Sequence[str]) -> Float[np.ndarray, " B"]:
    """Mean next-token loss of each text in nats, first token of the text included (predicted from the start token)."""
    losses = []
    for text in texts:
        tokens = model.to_tokens(text)
        logits = model(tokens)[0, :-1].float()
        losses.append(float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:])))
    return np.array(losses)


def gallery_losses(pair: Pair, sentences: Sequence[GallerySentence], seed: int = 0) -> GalleryLosses:
    """Losses of the three bundled models on the gallery."""
    texts, rng = [s.text for s in sentences], np.random.default_rng(seed)
    models = (pair.engram, pair.moe, pair.moe_control)
    engram, moe, control = (sentence_losses(model, texts) for model in models)
    return GalleryLosses(
        {m.identity.name: mean_interval(x) for m, x in zip(models, (engram, moe, control), strict=True)},
        paired_difference(engram, moe, rng=rng),
        paired_difference(moe, control, rng=rng),
    )


def run_demo(text: str, out: Path) -> int:
    """Print the gate strip of one sentence and the losses of the pair, then write the report of the pair into `out`.

    Raises: RunError when `out` holds something else.
    """
    from rich.console import Console

    from engram_interp.figures.strip import terminal_strips
    from engram_interp.probes.gates import read_gates
    from engram_interp.studies.report import run_report

    console, pair, sentences = Console(highlight=False, soft_wrap=True), load_pair("mini"), load_gallery()
    console.print(
        "[bold]When does the memory speak?[/] (gate of every token, dark 0 to bright 1; 0.5 means no evidence)"
    )
    reading = read_gates(pair.engram, text)
    for label, line in terminal_strips(
        reading.tokens, reading.layers, reading.gates, colour=console.color_system is not None
    ):
        console.print(f"{label}  ", line, sep="")
    console.print(_loss_table(gallery_losses(pair, sentences)))
    console.print("The report of the pair is being written: gates, lens, similarity, ablations (about a minute) ...")
    page = run_report(pair, out, quick=True)
    console.print(
        "Small models trained for this project; the numbers describe these checkpoints, not the published ones.\n"
        f"[bold]Report:[/] {page.resolve()}\n"
        "[bold]In full:[/] engram-interp report   [bold]Dashboard:[/] engram-interp app (from a checkout: make app)"
    )
    return 0


def _loss_table(losses: GalleryLosses):  # noqa: ANN202
    from rich.table import Table

    table = Table(title="Next-token loss on the gallery, nats per token")
    table.add_column("model")
    table.add_column("loss [95 %]")
    for name, estimate in losses.losses.items():
        table.add_row(name, str(estimate))
    table.add_section()
    table.add_row("engram - moe, paired", str(losses.engram_minus_moe))
    table.add_row("moe - control, paired (seed noise)", str(losses.moe_minus_control))
    return table
