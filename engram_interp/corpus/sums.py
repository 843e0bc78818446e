"""What must be kept of many tokens to know their means, spreads and quantiles?

Per quantity: how many, their sum and sum of squares, and counts in 100 bins. Bins of gates and shares are 0.01 wide; those of
nats are ten to a decade from 1e-7 to 1e3, and what lies outside goes to the first or last. Everything adds up, so pieces of a
corpus may be read anywhere; added in the same order they give the same bits. Misleads: a quantile read off the bins is good
to one bin, 0.01 for a gate and 26 % for nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float, Float64

if TYPE_CHECKING:
    import pandas as pd

BINS = 100
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_UNIT, _NATS = np.linspace(0, 1, BINS + 1), np.geomspace(1e-7, 1e3, BINS + 1)


@dataclass(frozen=True)
class Quantity:
    """One number per token. `layer`: the block of a gate, else the residual site (0 = embedding output); `branch`: -1 for none."""

    kind: Literal["gate", "kl", "cross_entropy", "agreement"]
    layer: int
    branch: int = -1

    @property
    def column(self) -> str:
        """Its name in a table with a row per token or document."""
        return f"{self.kind}_{self.layer}" + (f"_{self.branch}" if self.branch >= 0 else "")

    @property
    def edges(self) -> Float64[np.ndarray, " bins"]:
        """Of its bins."""
        return _NATS if self.kind in ("kl", "cross_entropy") else _UNIT


@dataclass(frozen=True, eq=False)
class Sums:
    """Row q: count, sum, sum of squares, then the bins of quantity q, all float64; values that are NaN were left out."""

    quantities: tuple[Quantity, ...]
    values: Float64[np.ndarray, "Q columns"]

    @classmethod
    def of(cls, quantities: Sequence[Quantity], values: Float[np.ndarray, "Q N"]) -> Sums:
        """Of N tokens."""
        rows = []
        for quantity, row in zip(quantities, values.astype(np.float64), strict=True):
            row = row[~np.isnan(row)]
            bins = (np.searchsorted(quantity.edges, row, side="right") - 1).clip(0, BINS - 1)
            rows.append([len(row), row.sum(), (row * row).sum(), *np.bincount(bins, minlength=BINS)])
        return cls(tuple(quantities), np.array(rows, dtype=np.float64))

    @classmethod
    def of_frame(cls, frame: pd.DataFrame) -> Sums:
        """What `frame` came from."""
        keys = zip(frame["kind"], frame["layer"], frame["branch"], strict=True)
        return cls(tuple(Quantity(k, int(l), int(b)) for k, l, b in keys), frame.iloc[:, 3:].to_numpy(np.float64))

    def frame(self) -> pd.DataFrame:
        """One row per quantity."""
        import pandas as pd

        columns = ["count", "sum", "squares", *(f"bin_{i:02d}" for i in range(BINS))]
        keys = pd.DataFrame([vars(q) for q in self.quantities])
        return pd.concat([keys, pd.DataFrame(self.values, columns=columns)], axis=1)

    def summary(self) -> pd.DataFrame:
        """One row per quantity: tokens, mean, standard deviation over tokens, quantiles."""
        import pandas as pd

        rows = []
        for quantity, (count, total, squares, *_) in zip(self.quantities, self.values, strict=True):
            mean = total / count if count else np.nan
            spread = np.sqrt(max(0.0, squares / count - mean * mean)) if count else np.nan
            quantiles = {f"q{round(100 * p):02d}": self.quantile(quantity, p) for p in QUANTILES}
            rows.append({**vars(quantity), "tokens": int(count), "mean": mean, "sd": spread, **quantiles})
        return pd.DataFrame(rows)

    def quantile(self, quantity: Quantity, p: float) -> float:
        """The middle of the bin in which a share p of the tokens is reached, geometric for nats; NaN without tokens or for a share."""
        counts = self.values[self.quantities.index(quantity), 3:]
        if quantity.kind == "agreement" or not counts.sum():
            return float("nan")
        index = int(np.searchsorted(counts.cumsum(), p * counts.sum()))
        low, high = quantity.edges[index : index + 2]
        return float(np.sqrt(low * high) if quantity.edges is _NATS else (low + high) / 2)

    def histogram(self) -> pd.DataFrame:
        """One row per quantity and bin that holds a token."""
        import pandas as pd

        q, b = np.nonzero(self.values[:, 3:])
        edges = np.stack([quantity.edges for quantity in self.quantities])
        keys = pd.DataFrame([vars(self.quantities[i]) for i in q])
        counts = {"left": edges[q, b], "right": edges[q, b + 1], "tokens": self.values[q, 3 + b].astype(np.int64)}
        return pd.concat([keys, pd.DataFrame(counts)], axis=1)
