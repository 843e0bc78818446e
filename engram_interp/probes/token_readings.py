"""Which number colours each token of a text, and over which range?

A text is coloured by one of four quantities: `gate` (0 to 1, 0.5 is no evidence), `score` under it (signed), `write`
(|Y| / |h|, how much was really written), `effect` (what the memory does to the next token's log-probability, signed,
nats). `shown` is one number per token for the chosen layer: a branch, their mean, or their largest. `grid` holds every
layer and branch, because no branch is ever the only one shown. Ranges are natural (gate) or symmetric (signed) and can
be shared between two texts. Cost: none. Misleads: a mean over branches hides one branch that is open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Literal

import numpy as np
from jaxtyping import Float, Int64

from engram_interp.probes.gates import GateMap
from engram_interp.probes.token_effects import TokenEffects

Quantity = Literal["gate", "score", "write", "effect"]
LABELS: dict[Quantity, str] = {
    "gate": "gate",
    "score": "score under the gate",
    "write": "write / stream, |Y| / |h|",
    "effect": "change of the next token's log p by the memory, nats",
}
SIGNED = ("score", "effect")


@dataclass(frozen=True, eq=False)
class TokenReadings:
    """What to draw. `grid` [rows, T] has a label and a block (-1: all) per row; `bars` [T, M]: branches."""

    quantity: Quantity
    layer: int
    tokens: tuple[str, ...]
    token_ids: Int64[np.ndarray, " T"]
    shown: Float[np.ndarray, " T"]
    bars: Float[np.ndarray, "T M"]
    grid: Float[np.ndarray, "rows T"]
    labels: tuple[str, ...]
    blocks: tuple[int, ...]
    low: float
    high: float

    @property
    def peak(self) -> int:
        """Position of the largest shown value by size, the first token left out where there is more than one."""
        values = np.nan_to_num(np.abs(self.shown))
        first = 1 if len(values) > 1 else 0
        return first + int(values[first:].argmax())

    def window(self, start: int, stop: int) -> TokenReadings:
        """Positions [start, stop) on the same range."""
        part = slice(start, stop)
        return replace(
            self,
            tokens=self.tokens[part],
            token_ids=self.token_ids[part],
            shown=self.shown[part],
            bars=self.bars[part],
            grid=self.grid[:, part],
        )


def token_readings(
    gates: GateMap,
    quantity: Quantity = "gate",
    *,
    layer: int | None = None,
    branch: int | Literal["mean", "max"] = "mean",
    effects: Sequence[TokenEffects] = (),
) -> TokenReadings:
    """The numbers of one picture.

    Args: layer: None is the first memory; branch: which branch colours the text; effects: needed for `effect`: of all
        memories, then of each by itself in the order of `gates.layers` (or of all only); they may cover a part of the
        text.
    Raises: ValueError for an unknown quantity, layer or branch, or effects that do not fit the text.
    """
    layer = gates.layers[0] if layer is None else layer
    if layer not in gates.layers:
        raise ValueError(f"expected a layer among {list(gates.layers)}, found {layer}")
    if quantity not in LABELS:
        raise ValueError(f"expected a quantity among {', '.join(LABELS)}, found {quantity!r}")
    e = gates.layers.index(layer)
    if quantity == "effect":
        return _effect_readings(gates, e, effects)
    if quantity == "write":
        share = gates.write_norm / np.maximum(gates.hidden_norm, np.finfo(np.float32).tiny)
        labels, blocks, grid = tuple(f"block {b}" for b in gates.layers), gates.layers, share.T
        shown, bars = share[:, e], gates.gates[:, e]
    else:
        values = gates.gates if quantity == "gate" else gates.scores
        pairs = [(block, m) for block in gates.layers for m in range(gates.branches)]
        labels, blocks = tuple(f"block {b} · branch {m}" for b, m in pairs), tuple(b for b, _ in pairs)
        grid, shown, bars = values.reshape(len(gates.tokens), -1).T, _reduced(values[:, e], branch), gates.gates[:, e]
    low, high = _range(quantity, grid)
    return TokenReadings(quantity, layer, gates.tokens, gates.token_ids, shown, bars, grid, labels, blocks, low, high)


def _reduced(values: Float[np.ndarray, "T M"], branch: int | Literal["mean", "max"]) -> Float[np.ndarray, " T"]:
    if branch == "mean":
        return values.mean(1)
    if branch == "max":
        return values.max(1)
    if not 0 <= branch < values.shape[1]:
        raise ValueError(f"expected a branch in [0, {values.shape[1]}), mean or max, found {branch}")
    return values[:, branch]


def _effect_readings(gates: GateMap, e: int, effects: Sequence[TokenEffects]) -> TokenReadings:
    """Of the positions the effects cover: without all memories, then without each by itself where that is given."""
    if len(effects) not in (1, 1 + len(gates.layers)):
        raise ValueError(
            f"expected the effect of all memories, and of each of {list(gates.layers)} or of none; found {len(effects)}"
        )
    part = slice(effects[0].first, effects[0].first + len(effects[0].tokens))
    if any(x.tokens != gates.tokens[part] or x.first != part.start for x in effects):
        raise ValueError("expected effects of the text whose gates these are")
    grid = np.stack([x.change for x in effects]).astype(np.float64)
    labels = ("all memories", *(f"block {b} alone" for b in gates.layers))[: len(effects)]
    low, high = _range("effect", grid)
    return TokenReadings(
        "effect", gates.layers[e], gates.tokens[part], gates.token_ids[part], grid[0], gates.gates[part, e], grid,
        labels, (-1, *gates.layers)[: len(effects)], low, high,
    )  # fmt: skip


def _range(quantity: Quantity, grid: Float[np.ndarray, "rows T"]) -> tuple[float, float]:
    if quantity == "gate":
        return 0.0, 1.0
    largest = float(np.nanmax(np.abs(grid), initial=0.0)) or 1.0
    return (-largest, largest) if quantity in SIGNED else (0.0, largest)


def shared_range(a: TokenReadings, b: TokenReadings) -> tuple[TokenReadings, TokenReadings]:
    """Both on the wider of the two ranges, so that a colour means the same in both.

    Raises: ValueError for different quantities.
    """
    if a.quantity != b.quantity:
        raise ValueError(f"expected one quantity, found {a.quantity} and {b.quantity}")
    low, high = min(a.low, b.low), max(a.high, b.high)
    return replace(a, low=low, high=high), replace(b, low=low, high=high)


def align(a: TokenReadings, b: TokenReadings) -> Int64[np.ndarray, "pairs 2"]:
    """Positions of the tokens two texts have in common, in order (longest matching blocks of token ids)."""
    matcher = SequenceMatcher(None, a.token_ids.tolist(), b.token_ids.tolist(), autojunk=False)
    pairs = [(i + k, j + k) for i, j, size in matcher.get_matching_blocks() for k in range(size)]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def difference(a: TokenReadings, b: TokenReadings) -> TokenReadings | None:
    """b - a where the texts have tokens in common, on a symmetric range; None where fewer than half of them are.

    Raises: ValueError for different quantities or rows.
    """
    if a.quantity != b.quantity or a.labels != b.labels or a.layer != b.layer:
        raise ValueError("expected one quantity, layer and set of rows in both texts")
    pairs = align(a, b)
    if 2 * len(pairs) < min(len(a.tokens), len(b.tokens)):
        return None
    i, j = pairs.T
    grid = b.grid[:, j] - a.grid[:, i]
    limit = float(np.nanmax(np.abs(grid), initial=0.0)) or 1.0
    return TokenReadings(
        b.quantity, b.layer, tuple(b.tokens[k] for k in j), b.token_ids[j], b.shown[j] - a.shown[i],
        np.abs(b.bars[j] - a.bars[i]), grid, b.labels, b.blocks, -limit, limit,
    )  # fmt: skip


def effect_grid(effects: Sequence[TokenEffects]) -> TokenReadings:
    """Several ablations of one text under one another, the first one shown; bars are the size of the change, relative.

    Raises: ValueError for effects of different tokens.
    """
    if any(e.tokens != effects[0].tokens for e in effects):
        raise ValueError("expected effects of one text")
    grid = np.stack([e.change for e in effects]).astype(np.float64)
    low, high = _range("effect", grid)
    bars = np.nan_to_num(np.abs(grid.T)) / high
    ids = np.arange(len(effects[0].tokens), dtype=np.int64)
    labels = tuple(e.condition for e in effects)
    return TokenReadings(
        "effect", -1, effects[0].tokens, ids, grid[0], bars, grid, labels, (-1,) * len(effects), low, high
    )
