"""Does an open gate mean that the memory mattered?

At sampled positions: the gate (every branch and their mean), the norm of the gated value and of the write, against what
removing the write at that one position does: KL(full || ablated) of the next token there, in nats. Spearman's rank
correlation per block, with a bootstrap over texts. Cost: one forward of `per_text` copies per text and block. Misleads:
a correlation of .7 leaves half of the ranking unexplained; a gate is evidence about the memory's effect, not the
effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from engram_interp.hooks.ablation import ablate
from engram_interp.hooks.site import Site
from engram_interp.measure.statistics import LEVEL, Estimate, not_estimable
from engram_interp.models.protocol import MemoryModel
from engram_interp.models.text import start_tokens, windows
from engram_interp.runs import Provenance, texts_hash
from engram_interp.shapes import Int64, Tensor

if TYPE_CHECKING:
    import pandas as pd

_RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class GateCredit:
    """`positions`: a row per block and sampled position with its gates, norms and KL; texts are independent units."""

    model: str
    positions: pd.DataFrame = field(repr=False)
    provenance: Provenance = field(repr=False)
    seed: int = 0

    def table(self) -> pd.DataFrame:
        """Spearman's rho of each measure with the KL, with its interval over texts, per block."""
        import pandas as pd

        measures = [c for c in self.positions if c.startswith("gate") or c in ("gated_value_norm", "write_norm")]
        rows = []
        for block, frame in self.positions.groupby("block"):
            for measure in measures:
                rho = rank_correlation(
                    frame[measure].to_numpy(dtype=float), frame["kl"].to_numpy(dtype=float), frame["text"].to_numpy(),
                    np.random.default_rng(self.seed),
                )  # fmt: skip
                rows.append((block, measure, rho.value, rho.low, rho.high, rho.n, rho.rows, rho.reason))
        return pd.DataFrame(rows, columns=["block", "measure", "rho", "rho_low", "rho_high", "texts", "rows", "reason"])


def rank_correlation(x: np.ndarray, y: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> Estimate:
    """Spearman's rho with a percentile bootstrap over groups; not estimable when either side is constant."""
    from scipy.stats import rankdata

    def rho(rows: np.ndarray) -> float:
        return float(np.corrcoef(rankdata(x[rows]), rankdata(y[rows]))[0, 1])

    labels = np.unique(groups)
    if len(labels) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return not_estimable("expected at least 3 texts and values that vary", len(labels))
    members = [np.flatnonzero(groups == label) for label in labels]
    draws = []
    for _ in range(_RESAMPLES):
        chosen = np.concatenate([members[i] for i in rng.integers(0, len(labels), len(labels))])
        if np.ptp(x[chosen]) and np.ptp(y[chosen]):
            draws.append(rho(chosen))
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(
        rho(np.arange(len(x))), float(low), float(high), float(np.std(draws, ddof=1)), len(labels), LEVEL, len(x)
    )


@torch.no_grad()
def gate_credit(
    model: MemoryModel, texts: Sequence[str], *, per_text: int = 8, blocks: Sequence[int] | None = None, seed: int = 0
) -> GateCredit:
    """Measure gates and single-position ablations at `per_text` random positions of the first window of each text.

    Raises: ValueError for no texts or a block without a memory.
    """
    import pandas as pd

    if not texts:
        raise ValueError("expected at least one text, found none")
    chosen = model.engram_layers if blocks is None else tuple(blocks)
    rng, first, rows = np.random.default_rng(seed), len(start_tokens(model)), []
    for number, text in enumerate(texts):
        tokens = next(iter(windows(model, text))).tokens
        candidates = np.arange(first, tokens.shape[1])
        places = np.sort(rng.choice(candidates, size=min(per_text, len(candidates)), replace=False))
        for block in chosen:
            rows += [{"text": number, "block": block, **row} for row in _measure(model, block, tokens, places)]
    options = {"per_text": per_text, "blocks": list(chosen), "seed": seed}
    provenance = Provenance(
        {model.identity.name: model.identity.weights_sha256}, texts_hash(texts), len(texts), options
    )
    return GateCredit(model.identity.name, pd.DataFrame(rows), provenance, seed)


def _measure(
    model: MemoryModel, block: int, tokens: Int64[Tensor, "1 T"], places: np.ndarray
) -> list[dict[str, object]]:
    site, chosen = Site(model, block), torch.from_numpy(places)
    names = [site.inside("gate"), site.inside("gated_value"), site.write]
    copies = tokens.expand(len(places), -1)
    logits, cache = model.run_with_cache(copies, names)
    masks = torch.zeros(copies.shape, dtype=torch.bool)
    row = torch.arange(len(places))
    masks[row, chosen] = True
    with ablate(model, "output_zero", blocks=[block], positions=masks):
        without = model(copies)
    full, ablated = (x[row, chosen].float().log_softmax(-1) for x in (logits, without))
    kl = (full.exp() * (full - ablated)).sum(-1)
    gates = cache[names[0]][row, chosen].float()
    norms = [cache[name][row, chosen].float().flatten(1).norm(dim=1) for name in names[1:]]
    return [
        {
            "position": int(places[i]),
            "gate_mean": float(gates[i].mean()),
            **{f"gate_branch_{m}": float(g) for m, g in enumerate(gates[i])},
            "gated_value_norm": float(norms[0][i]),
            "write_norm": float(norms[1][i]),
            "kl": float(kl[i]),
        }
        for i in range(len(places))
    ]
