"""Which n-gram, and which of its rows, did the prediction need?

At each position and memory, silence one row (or the K rows of one n-gram) and measure the change of log p(answer) in
nats after the last token. Ablation effects, so that the gate and later layers react: rows of one n-gram usually add up
to less or more than the n-gram. Cost: one forward of S + N + 1 copies of the text per position and block. Misleads when
hash heads are redundant: every single row then looks unimportant, and only the n-gram shows the effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from engram_interp.hooks.site import Site
from engram_interp.models.protocol import MemoryModel
from engram_interp.models.text import show_tokens
from engram_interp.runs import Provenance, texts_hash
from engram_interp.shapes import Bool, Float, Tensor

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

WHOLE = -1  # the head number of a row that stands for all heads of an n-gram


@dataclass(frozen=True, eq=False)
class SlotEffects:
    """`rows`: per block, position, order and head (-1: the whole n-gram), the change of log p(answer) in nats."""

    model: str
    tokens: tuple[str, ...]
    answer: str
    logprob: float
    rows: pd.DataFrame = field(repr=False)
    provenance: Provenance = field(repr=False)

    def table(self) -> pd.DataFrame:
        """Columns block, position, ngram, order, head, change_logprob."""
        return self.rows

    def figure(self) -> go.Figure:
        """Effect of silencing each n-gram, blocks and orders over positions."""
        from engram_interp.figures.signed_map import signed_map

        grid = self.rows[self.rows["head"] == WHOLE].pivot(
            index=["block", "order"], columns="position", values="change_logprob"
        )
        labels = [f"{order}-gram @ block {block}" for block, order in grid.index]
        return signed_map(
            grid.to_numpy(dtype=float), labels, [self.tokens[p] for p in grid.columns],
            title=f"Silencing one n-gram: change of log p({self.answer!r})", unit="nats",
        )  # fmt: skip


@torch.no_grad()
def slot_effects(
    model: MemoryModel,
    text: str,
    answer: str,
    *,
    blocks: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> SlotEffects:
    """Silence every slot and every n-gram, one at a time.

    Args: answer: what should follow the text, with its space (its first token is scored); positions: where, None for
        every token.
    Raises: ValueError for an empty answer, a position outside the text or a block without a memory.
    """
    import pandas as pd

    tokens = model.to_tokens(text)
    target = model.tokenizer.encode(answer, add_special_tokens=False).ids[:1]
    chosen = model.engram_layers if blocks is None else tuple(blocks)
    places = range(tokens.shape[1]) if positions is None else positions
    if not target or any(not 0 <= p < tokens.shape[1] for p in places):
        raise ValueError(
            f"expected an answer and positions in [0, {tokens.shape[1]}), found {answer!r}, {list(places)}"
        )
    shown = show_tokens(model.tokenizer, tokens[0].tolist())
    rows, base = [], 0.0
    for block in chosen:
        site = Site(model, block)
        labels, lost = _silenced(site)
        for position in places:
            logprob = _logprobs(site, tokens, position, lost, target[0])
            base = float(logprob[-1])
            for (order, head), value in zip(labels, (logprob[:-1] - logprob[-1]).tolist(), strict=True):
                ngram = "".join(shown[max(0, position - order + 1) : position + 1])
                rows.append((block, position, ngram, order, head, value))
    frame = pd.DataFrame(rows, columns=["block", "position", "ngram", "order", "head", "change_logprob"])
    provenance = Provenance(
        {model.identity.name: model.identity.weights_sha256}, texts_hash([text, answer]), 1, {"blocks": list(chosen)}
    )
    return SlotEffects(model.identity.name, tuple(shown), answer, base, frame, provenance)


def _silenced(site: Site) -> tuple[list[tuple[int, int]], Bool[Tensor, "copies S"]]:
    """(order, head) of each copy of the text, and the slots it loses; the last copy loses none."""
    ngram_hash = site.memory.ngram_hash  # type: ignore[attr-defined]
    k, orders = ngram_hash.heads, ngram_hash.orders
    labels = [(order, WHOLE) for order in orders] + [(order, head) for order in orders for head in range(k)]
    lost = torch.zeros(len(labels) + 1, k * len(orders), dtype=torch.bool)
    for copy, (order, head) in enumerate(labels):
        first = (order - 2) * k
        lost[copy, slice(first, first + k) if head == WHOLE else first + head] = True
    return labels, lost


def _logprobs(
    site: Site, tokens: Tensor, position: int, lost: Bool[Tensor, "copies S"], target: int
) -> Float[Tensor, " copies"]:
    def silence(value: Tensor, hook: object) -> Tensor:
        out = value.clone()
        columns = lost.to(value.device).repeat_interleave(value.shape[-1] // lost.shape[1], dim=1)
        out[:, position] = out[:, position].masked_fill(columns, 0.0)
        return out

    with site.model.hooks([(site.inside("embedding"), silence)]):
        logits = site.model(tokens.expand(len(lost), -1))
    return logits[:, -1].float().log_softmax(-1)[:, target]
