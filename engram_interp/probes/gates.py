"""When does the memory speak?

`read_gates` shows one text: the gate of every token, Engram layer and branch, the score under it and the size of the write.
`record_gates` streams a corpus: quantiles, strata, frequency of the n-gram, relation to the loss, strongest contexts, and the
exact split of the write into its gated value and its convolution.

A gate is sigmoid(signed root of the score) in (0, 1); 0.5 is a score of 0, "no evidence". Cost: one forward. Misleads: the
convolution is not scaled by the gate and carries the memory of tokens t-3, t-6, t-9, so a closed gate is not a silent layer;
gates of different layers and branches are not on one scale, which is why all of them are shown and none is selected.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int64

from engram_interp.models.protocol import MemoryModel
from engram_interp.models.text import show_tokens, windows
from engram_interp.runs import Provenance, texts_hash
from engram_interp.runs.result_files import write_form

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class GateMap:
    """Gates of one text. Units: gates in (0, 1); scores dimensionless; norms in residual units, over all branches together.

    `write_norm` is |Y| and `hidden_norm` is |h| before the write, so their ratio says how much was really written.
    """

    model: str
    text: str
    tokens: tuple[str, ...]
    token_ids: Int64[np.ndarray, " T"]
    layers: tuple[int, ...]
    gates: Float[np.ndarray, "T E M"]
    scores: Float[np.ndarray, "T E M"]
    write_norm: Float[np.ndarray, "T E"]
    hidden_norm: Float[np.ndarray, "T E"]
    provenance: Provenance

    @property
    def branches(self) -> int:
        """M."""
        return self.gates.shape[2]

    def as_dict(self) -> dict[str, object]:
        """Plain data: `gates` and `scores` [T][E][M], `write_norm` and `hidden_norm` [T][E]."""
        return {
            "model": self.model,
            "tokens": list(self.tokens),
            "layers": list(self.layers),
            "gates": self.gates.tolist(),
            "scores": self.scores.tolist(),
            "write_norm": self.write_norm.tolist(),
            "hidden_norm": self.hidden_norm.tolist(),
            "provenance": self.provenance.as_dict(),
        }

    def table(self) -> pd.DataFrame:
        """One row per token, layer and branch."""
        import pandas as pd

        t, e, m = np.meshgrid(*map(np.arange, self.gates.shape), indexing="ij")
        return pd.DataFrame(
            {
                "position": t.ravel(),
                "token": np.asarray(self.tokens, dtype=object)[t.ravel()],
                "layer": np.asarray(self.layers)[e.ravel()],
                "branch": m.ravel(),
                "gate": self.gates.ravel(),
                "score": self.scores.ravel(),
                "write_norm": self.write_norm[t.ravel(), e.ravel()],
                "hidden_norm": self.hidden_norm[t.ravel(), e.ravel()],
            }
        )

    def figure(self) -> go.Figure:
        """Heat map: one row per layer and branch, one column per token."""
        from engram_interp.figures.gatemap import gate_heatmap

        return gate_heatmap(self.tokens, self.layers, self.gates, title=self.model)

    def write(self, path: Path) -> None:
        """Write the result as `.html`, `.csv` or `.json`, by the suffix.

        Raises: ValueError for another suffix.
        """
        forms = {
            ".html": self.html,
            ".csv": lambda: self.table().to_csv(index=False),
            ".json": lambda: json.dumps(self.as_dict()),
        }
        write_form(path, forms)

    def html(self) -> str:
        """A page of its own with the text coloured by every layer and branch."""
        from engram_interp.figures.strip import strip_page

        return strip_page(self.tokens, self.layers, self.gates, self.model, self.provenance)


def read_gates(model: MemoryModel, text: str, *, limit: int | None = None) -> GateMap:
    """Gates, scores and write norms of every token of a text, start token included.

    Args: limit: refuse longer texts (tokens); texts beyond the context are read in overlapping windows.
    Raises: ValueError for an empty or too long text, a model without memory, or a gate that is not finite (position named).

    >>> import engram_interp
    >>> from engram_interp.probes import read_gates
    >>> model = engram_interp.load("mini-engram")
    >>> gates = read_gates(model, "By the way, I am a fan of the Milky Way.")
    >>> gates.gates.shape == (len(gates.tokens), len(model.engram_layers), gates.branches)
    True
    """
    layers = _require_memory(model)
    parts = [_read_window(model, w.tokens, layers, w.keep) for w in windows(model, text, **_limit(limit))]
    ids, gates, scores, write, hidden = (np.concatenate([part[i] for part in parts]) for i in range(5))
    if not np.isfinite(gates).all():
        t, e, m = np.argwhere(~np.isfinite(gates))[0]
        raise ValueError(f"gate at token {t}, layer {layers[e]}, branch {m} is {gates[t, e, m]}")
    return GateMap(
        model=model.identity.name,
        text=text,
        tokens=tuple(show_tokens(model.tokenizer, ids.tolist())),
        token_ids=ids,
        layers=layers,
        gates=gates,
        scores=scores,
        write_norm=write,
        hidden_norm=hidden,
        provenance=_provenance(model, [text], {"windows": len(parts)}),
    )


def _limit(limit: int | None) -> dict[str, int]:
    return {} if limit is None else {"limit": limit}


def _require_memory(model: MemoryModel) -> tuple[int, ...]:
    layers = tuple(getattr(model, "engram_layers", ()))
    if not layers:
        raise ValueError(f"model {model.identity.name!r} has no memory to look at (no Engram layer)")
    if not hasattr(model, "exit_hidden"):
        raise ValueError(
            f"model {model.identity.name!r} was opened without its backbone, so there are no hidden states to gate; "
            "capture them elsewhere and give them as a recording (read_recorded_gates, gates --recorded)"
        )
    return layers


def _provenance(model: MemoryModel, texts: Sequence[str], options: dict[str, object]) -> Provenance:
    return Provenance({model.identity.name: model.identity.weights_sha256}, texts_hash(texts), len(texts), options)


def _read_window(model: MemoryModel, tokens, layers: tuple[int, ...], keep: slice) -> tuple[np.ndarray, ...]:  # noqa: ANN001
    names = [
        name
        for i in layers
        for name in (
            f"blocks.{i}.engram.hook_gate",
            f"blocks.{i}.engram.hook_score",
            f"blocks.{i}.hook_engram_out",
            f"blocks.{i}.hook_resid_pre",
        )
    ]
    _, cache = model.run_with_cache(tokens, names)

    def stack(name: str, norm: bool = False) -> np.ndarray:
        records = [cache[f"blocks.{i}.{name}"][0, keep].float() for i in layers]
        if norm:
            records = [record.flatten(1).norm(dim=1) for record in records]
        return np.stack([record.numpy() for record in records], axis=1)

    ids = tokens[0, keep].numpy()
    return (
        ids,
        stack("engram.hook_gate"),
        stack("engram.hook_score"),
        stack("hook_engram_out", norm=True),
        stack("hook_resid_pre", norm=True),
    )
