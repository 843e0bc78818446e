"""The three-minute look: where does the memory of the bundled model speak, does it help, and the report of the pair.

Cost: about a minute of one core, nearly all of it the quick form of the report (every other sentence, fewer items).
"""

from __future__ import annotations

from pathlib import Path

from engram_interp.gallery import load_gallery
from engram_interp.models.registry import load_pair
from engram_interp.studies.gallery_loss import GalleryLosses, gallery_losses


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
