"""What else did an edit change?

An edited row is read wherever an n-gram hashes to it, and a write at t reaches further: the convolution (kernel 4,
dilation d) carries it to t+d, t+2d, t+3d inside the same memory, and attention carries it to every later position. So
each position of the probe text and of a corpus is put into one class:

- `reads`: its own n-grams read an edited row (with how many of the S slots);
- `conv`: reads none, but the convolution reaches back to one that does;
- `later`: only attention can carry the change here;
- `untouched`: no edited row was read before: logits must be bit-equal, and are not recomputed.

Reported: change of the write (norm), and KL(before || after) of the next token in nats. Cost: addresses for every text,
two forwards for each window that reads an edited row. Misleads when the corpus is small: rare n-grams that share a row
do not occur in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from engram_interp.hooks.overlay import Overlay, apply_overlay
from engram_interp.hooks.site import Site
from engram_interp.measure.statistics import mean_interval
from engram_interp.models.protocol import MemoryModel
from engram_interp.models.text import show_tokens, windows
from engram_interp.runs import Provenance, texts_hash
from engram_interp.shapes import Bool, Int64, Tensor

if TYPE_CHECKING:
    import pandas as pd

CLASSES = ("reads", "conv", "later", "untouched")


@dataclass(frozen=True, eq=False)
class EditSpecificity:
    """`positions`: a row per position of every window that reads an edited row; the rest is counted in `untouched`.

    Columns: text, window, position, ngram (the longest order), reached (class), shared (most edited slots read in one
    memory), slots (S), write_change (all edited memories together), kl.
    """

    model: str
    positions: pd.DataFrame = field(repr=False)
    untouched: int
    texts: int
    provenance: Provenance = field(repr=False)

    def table(self) -> pd.DataFrame:
        """Per class: positions, share of all, mean KL over texts with interval, and the largest KL."""
        import pandas as pd

        total = len(self.positions) + self.untouched
        rows = []
        for reached in CLASSES:
            frame = self.positions.loc[self.positions["reached"] == reached]
            count = len(frame) + (self.untouched if reached == "untouched" else 0)
            kl, low, high = _mean(frame)
            largest = float(frame["kl"].max()) if len(frame) else 0.0
            rows.append((reached, count, count / total if total else 0.0, kl, low, high, largest))
        return pd.DataFrame(rows, columns=["reached", "positions", "share", "kl", "kl_low", "kl_high", "kl_max"])

    def ngrams(self) -> pd.DataFrame:
        """Every n-gram met that reads an edited row: slots shared, occurrences, mean and largest KL there."""
        reads = self.positions[self.positions["reached"] == "reads"]
        grouped = reads.groupby(["ngram", "shared", "slots"], sort=False)["kl"]
        table = grouped.agg(occurrences="count", kl="mean", kl_max="max").reset_index()
        return table.sort_values(["shared", "occurrences"], ascending=False, ignore_index=True)


def _mean(frame: pd.DataFrame) -> tuple[float, float, float]:
    """Mean KL with its interval over texts; no interval from a single text."""
    if not len(frame):
        return float("nan"), float("nan"), float("nan")
    if len(set(frame["text"])) < 2:
        mean = float(frame["kl"].mean())  # pyright: ignore[reportArgumentType] - pandas: the mean of a column is a number
        return mean, float("nan"), float("nan")
    estimate = mean_interval(frame["kl"].to_numpy(dtype=float), frame["text"].to_numpy())
    return estimate.value, estimate.low, estimate.high


@torch.no_grad()
def edit_specificity(model: MemoryModel, overlay: Overlay, texts: Sequence[str]) -> EditSpecificity:
    """Follow an edit through texts: the probe prompt with a continuation, and a corpus.

    Raises: ValueError for no texts; OverlayError when the overlay does not fit the model.
    """
    import pandas as pd

    if not texts:
        raise ValueError("expected at least one text, found none")
    rows, untouched = [], 0
    for number, text in enumerate(texts):
        for w, window in enumerate(windows(model, text)):
            shared = {block: _shared(model, block, overlay, window.tokens) for block in overlay.edits}
            keep = range(*window.keep.indices(window.tokens.shape[1]))
            if not any(bool(s.any()) for s in shared.values()):
                untouched += len(keep)
                continue
            found = _follow(model, overlay, window.tokens, shared)
            rows += [{"text": number, "window": w, **found[p]} for p in keep]
    columns = ["text", "window", "position", "ngram", "reached", "shared", "slots", "write_change", "kl"]
    provenance = Provenance(
        {model.identity.name: model.identity.weights_sha256}, texts_hash(texts), len(texts), dict(overlay.about)
    )
    return EditSpecificity(model.identity.name, pd.DataFrame(rows, columns=columns), untouched, len(texts), provenance)


def _shared(model: MemoryModel, block: int, overlay: Overlay, tokens: Int64[Tensor, "1 T"]) -> Int64[Tensor, " T"]:
    """Edited slots each position reads."""
    ngram_hash = Site(model, block).memory.ngram_hash  # type: ignore[attr-defined]
    read = ngram_hash.addressed_rows(tokens)[0]
    return torch.isin(read, overlay.edits[block].rows).sum(-1)


def _follow(
    model: MemoryModel, overlay: Overlay, tokens: Int64[Tensor, "1 T"], shared: dict[int, Tensor]
) -> list[dict[str, object]]:
    writes = [Site(model, block).write for block in overlay.edits]
    before, cache = model.run_with_cache(tokens, writes)
    with apply_overlay(model, overlay):
        after, edited = model.run_with_cache(tokens, writes)
    p, q = (x[0].float().log_softmax(-1) for x in (before, after))
    kl = (p.exp() * (p - q)).sum(-1)
    norms = ((edited[w] - cache[w])[0].float().flatten(1).norm(dim=1) for w in writes)
    change = sum(norms, start=torch.zeros(()))
    most = torch.stack(list(shared.values())).amax(0)
    reached = _classes(model, shared)
    orders = [Site(model, block).memory.ngram_hash for block in overlay.edits]  # type: ignore[attr-defined]
    longest, slots = max(h.orders[-1] for h in orders), len(orders[0].sizes)
    shown = show_tokens(model.tokenizer, tokens[0].tolist())
    return [
        {
            "position": t,
            "ngram": "".join(shown[max(0, t - longest + 1) : t + 1]),
            "reached": reached[t],
            "shared": int(most[t]),
            "slots": slots,
            "write_change": float(change[t]),
            "kl": float(kl[t]),
        }
        for t in range(len(shown))
    ]


def _classes(model: MemoryModel, shared: dict[int, Int64[Tensor, " T"]]) -> np.ndarray:
    reads, conv = (torch.zeros_like(next(iter(shared.values())), dtype=torch.bool) for _ in range(2))
    for block, counts in shared.items():
        reads |= counts > 0
        conv |= _conv_reach(model, block, counts > 0)
    later = reads.int().cumsum(0) > 0
    classes = np.where(later.numpy(), "later", "untouched")
    classes = np.where(conv.numpy(), "conv", classes)
    return np.where(reads.numpy(), "reads", classes)


def _conv_reach(model: MemoryModel, block: int, reads: Bool[Tensor, " T"]) -> Bool[Tensor, " T"]:
    """Positions whose convolution taps a position that reads an edited row."""
    memory = Site(model, block).memory
    out = torch.zeros_like(reads)
    for tap in range(1, memory.options.conv_kernel):  # type: ignore[attr-defined]
        shift = tap * memory.dilation  # type: ignore[attr-defined]
        if shift < len(reads):
            out[shift:] |= reads[: len(reads) - shift]
    return out
