"""`engram-interp evaluate`: the suite on one model or two, printed, and kept as a run folder."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engram_interp.models.adapters.opening import open_decoder
from engram_interp.runs.folder import start_run
from engram_interp.studies.evaluation import Evaluation, compare_evaluations, evaluate

if TYPE_CHECKING:
    import pandas as pd

RUNS = Path("runs/evaluate")


def run_evaluate(
    names: Sequence[str],
    data: Path | None,
    *,
    items: int,
    articles: int | None,
    seed: int,
    hub: Sequence[str],
    out: Path | None,
) -> tuple[list[Evaluation], list[pd.DataFrame], Path]:
    """Evaluate every model on the same items and keep scores, items and differences from the first.

    Args: out: run folder; None takes one below `runs/evaluate` that is named by what was evaluated, so that the same command
        always ends in the same folder.
    Returns: the evaluations, the first minus each of the others, and the folder.
    Raises: RunError when the folder holds another run.
    """
    progress = sys.stderr.isatty()
    results = [
        evaluate(open_decoder(name), data, limit=items, articles=articles, seed=seed, hub=hub, progress=progress)
        for name in names
    ]
    provenance = results[0].provenance
    models = {name: digest for result in results for name, digest in result.provenance.models.items()}
    config = dict(provenance.options)
    identity = json.dumps([models, config, provenance.texts_sha256], sort_keys=True)
    folder = out or RUNS / f"{results[0].model}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    with start_run(
        folder, study="evaluate", config=config, seeds=[seed], models=models, texts_sha256=provenance.texts_sha256
    ) as run:
        for result in results:
            run.write_table(f"items.{result.model}", result.items)
            run.write_text(f"{result.model}.json", json.dumps(result.as_dict(), indent=1))
        differences = [compare_evaluations(results[0], other) for other in results[1:]]
        for other, difference in zip(results[1:], differences, strict=True):
            run.write_table(f"difference.{other.model}", difference)
    return results, differences, folder
