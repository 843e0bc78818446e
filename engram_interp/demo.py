"""The three-minute look: where does the memory of the bundled model speak, and does the model predict better with it?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from engram_interp.gallery import GallerySentence, load_gallery
from engram_interp.measure.statistics import Estimate, mean_interval, paired_difference
from engram_interp.models.protocol import Decoder
from engram_interp.models.registry import Pair, load_pair
from engram_interp.probes.gate_statistics import GateStatistics, record_gates


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


def run_demo(text: str) -> int:
    """Print the gate strip of one sentence, gates at entities against the rest, and the losses of the pair."""
    from rich.console import Console

    from engram_interp.figures.strip import terminal_strips
    from engram_interp.probes.gates import read_gates

    console, pair, sentences = Console(highlight=False), load_pair("mini"), load_gallery()
    console.print(
        "[bold]When does the memory speak?[/] (gate of every token, dark 0 to bright 1; 0.5 means no evidence)"
    )
    reading = read_gates(pair.engram, text)
    for label, line in terminal_strips(
        reading.tokens, reading.layers, reading.gates, colour=console.color_system is not None
    ):
        console.print(f"{label}  ", line, sep="")
    console.print()
    console.print(_gate_table(record_gates(pair.engram, sentences, progress=sys.stderr.isatty()), len(sentences)))
    console.print(_loss_table(gallery_losses(pair, sentences)))
    console.print(
        "Small models trained for this project; the numbers describe these checkpoints, not the published ones."
    )
    return 0


def _gate_table(statistics: GateStatistics, sentences: int):  # noqa: ANN202
    from rich.table import Table

    table = Table(title=f"Mean gate over {sentences} sentences, 95 % interval over sentences")
    for column in ("layer", "branch", "entity-final", "phrase-final", "rest", "entity-final minus rest"):
        table.add_column(column)
    for s in statistics.summaries:
        strata = (s.strata[name] for name in ("entity-final", "phrase-final", "rest"))
        table.add_row(f"block {s.layer}", str(s.branch), *map(str, strata), str(s.difference["entity-final"]))
    return table


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
