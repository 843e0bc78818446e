"""When does the memory speak, in a model too large to run here?

A checkpoint opened without its backbone has every row and projection, but no hidden states. Captured elsewhere (hooks
in transformers, dumps of SGLang or vLLM) and stored as for `engram-interp check --recorded` (`input_ids` [B, T],
`L{block}.hidden_in` [B, T, M, D]), they give the gates, scores and writes of one text. Cost: the memory's own forward.
Misleads: hidden states of another model, precision or position give gates nobody computed; `check --recorded` compares
the recorded gates.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from engram_interp.models.adapters.hooked import HookedMemory
from engram_interp.models.check_recorded import read_recording, recorded_hidden, recorded_tokens
from engram_interp.models.house import HouseModel
from engram_interp.models.site import sites_of
from engram_interp.models.text import show_tokens
from engram_interp.probes.gates import GateMap
from engram_interp.runs import Provenance, texts_hash

_RECORDS = ("engram.hook_gate", "engram.hook_score", "hook_engram_out", "hook_resid_pre")


@torch.no_grad()
def read_recorded_gates(model: HouseModel | HookedMemory, path: Path, item: int = 0) -> GateMap:
    """Gates of one recorded text at every memory whose hidden states were recorded.

    Args: item: which of the B texts.
    Raises: ValueError for a model that has its backbone (it computes its own), a recording without hidden states, or
        an item outside it; RecordingError (a ValueError) for an unreadable or misshaped one.
    """
    if isinstance(model, HouseModel) or hasattr(model, "exit_hidden"):
        raise ValueError(f"model {model.identity.name!r} has its backbone; give it a text instead of a recording")
    arrays = read_recording(path)
    tokens = recorded_tokens(arrays, path)
    if not 0 <= item < len(tokens):
        raise ValueError(f"{path}: expected an item in [0, {len(tokens)}), found {item}")
    hidden = {site.block: recorded_hidden(site, arrays, tokens) for site in sites_of(model)}
    given = {block: streams[item : item + 1] for block, streams in hidden.items() if streams is not None}
    if not given:
        wanted = ", ".join(f"L{block}.hidden_in" for block in hidden)
        raise ValueError(f"{path}: expected hidden states under {wanted}, found {', '.join(sorted(arrays)[:6])}")
    ids = tokens[item : item + 1]
    _, cache = model.run_with_cache(ids, given)  # type: ignore[misc]

    def stack(name: str, norm: bool = False) -> np.ndarray:
        records = [cache[f"blocks.{block}.{name}"][0] for block in given]
        return torch.stack([r.flatten(1).norm(dim=1) if norm else r for r in records], dim=1).numpy()

    gate, score, write, before = _RECORDS
    shown = ids[0].tolist()
    return GateMap(
        model=model.identity.name,
        text="",
        tokens=tuple(map(str, shown) if model.tokenizer is None else show_tokens(model.tokenizer, shown)),
        token_ids=ids[0].numpy(),
        layers=tuple(given),
        gates=stack(gate),
        scores=stack(score),
        write_norm=stack(write, norm=True),
        hidden_norm=stack(before, norm=True),
        provenance=Provenance(
            {model.identity.name: model.identity.weights_sha256},
            texts_hash([]),
            1,
            {"recorded": path.name, "item": item},
        ),
    )
