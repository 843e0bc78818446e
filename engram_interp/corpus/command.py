"""`engram-interp corpus`, alone or under torchrun: open the model in every process, read, and let the first one report."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import torch

from engram_interp.corpus.processes import joined_processes
from engram_interp.corpus.reading import Probe
from engram_interp.corpus.run import CorpusOptions, CorpusResult, read_corpus_run


def run_corpus(
    model: str,
    texts: Path,
    out: Path,
    read: tuple[Probe, ...] = (),
    *,
    base: Path | None = None,
    device: str = "cpu",
    device_map: str | None = None,
    **options: Any,
) -> tuple[CorpusResult, dict[str, float | int]] | None:
    """The result and what reading cost this process (CPU seconds, the most memory it held); None in all but the first process.

    Args: read: empty for the gates of a model that has a memory, and the lens; options: fields of `CorpusOptions`;
        device_map: where transformers puts the weights, for one process.
    Raises: as `open_decoder` and `read_corpus_run`.
    """
    from engram_interp.models.adapters.opening import open_decoder

    with joined_processes(device) as team:
        if device_map is not None and (team.size > 1 or device != "cpu"):
            raise ValueError(
                "expected one process and no --device with --device-map: it places one model on several devices"
            )
        decoder = open_decoder(model, base, device_map=device_map)
        if device_map is None and isinstance(decoder, torch.nn.Module):
            decoder.to(team.device)
        has_memory = bool(getattr(decoder, "engram_layers", ()))
        probes = read or (("gates", "lens") if has_memory else ("lens",))
        start = time.process_time()
        result = read_corpus_run(decoder, texts, out, CorpusOptions(probes=probes, **options), team)
        used = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        tokens = int(result.summary["tokens"].to_numpy().max()) if team.rank == 0 else 0
        cost = {"tokens": tokens, "cpu_seconds": used, "peak_bytes": peak}
        return (result, cost) if team.rank == 0 else None
