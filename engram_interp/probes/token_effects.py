"""What does the memory change about the next token, position by position?

One text is read twice, with the memory and under an ablation (`engram_interp.hooks.KINDS`, by default a write of zero),
and the two next-token distributions are compared: change of the true next token's log-probability (with minus without,
nats; positive: the memory helps), KL(with || without), rank of the true token, most probable tokens of both. The entry
of position t is about the prediction of token t + 1, which is where the gate of token t acts; the last position has no
true token. Cost: one forward and one unembedding per condition. Misleads: effects are totals, later layers may repair
what was taken; zero is off the training distribution, so some of the harm is the shock (compare with `resample` and
`equal_norm_random`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int64

from engram_interp.hooks.ablation import ablate
from engram_interp.hooks.statistics import MemoryStatistics
from engram_interp.measure.divergence import kl_divergence
from engram_interp.models.protocol import Decoder
from engram_interp.models.text import MAX_TOKENS, Window, show_tokens, windows
from engram_interp.runs import Provenance, texts_hash
from engram_interp.shapes import Tensor

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_CHUNK = 256  # positions unembedded at a time
_ARMS = ("with", "without")


@dataclass(frozen=True, eq=False)
class TokenEffects:
    """Predictions with and without a memory, axis A = (with, without).

    `first` is the position of the first token covered. Units: nats; `logprob` and `rank` (1 = first choice) are of the
    true next token, NaN and 0 at the last position. `top_ids[a, t]` are the most probable next tokens, best first,
    `top_logprob` their log-probabilities.
    """

    model: str
    condition: str
    text: str
    first: int
    tokens: tuple[str, ...]
    following: tuple[str, ...]
    logprob: Float[np.ndarray, "A T"]
    rank: Int64[np.ndarray, "A T"]
    kl: Float[np.ndarray, " T"]
    top_ids: Int64[np.ndarray, "A T top"]
    top_logprob: Float[np.ndarray, "A T top"]
    top_tokens: tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]
    provenance: Provenance

    @property
    def change(self) -> Float[np.ndarray, " T"]:
        """Log-probability of the true next token with the memory minus without it, nats."""
        return self.logprob[0] - self.logprob[1]

    def table(self) -> pd.DataFrame:
        """One row per position."""
        import pandas as pd

        positions = self.first + np.arange(len(self.tokens))
        columns = {"position": positions, "token": self.tokens, "next_token": self.following}
        for a, arm in enumerate(_ARMS):
            columns |= {
                f"logprob_{arm}": self.logprob[a],
                f"rank_{arm}": self.rank[a],
                f"top_{arm}": [choices[0] for choices in self.top_tokens[a]],
            }
        return pd.DataFrame({**columns, "change": self.change, "kl": self.kl})

    def predictions(self, position: int) -> pd.DataFrame:
        """The most probable next tokens at a position: with the memory, and without it, best first.

        Raises: ValueError for a position outside the text.
        """
        import pandas as pd

        at = position - self.first
        if not 0 <= at < len(self.tokens):
            raise ValueError(
                f"expected a position in [{self.first}, {self.first + len(self.tokens)}), found {position}"
            )
        columns: dict[str, object] = {}
        for a, arm in enumerate(_ARMS):
            columns[f"{arm} memory"] = self.top_tokens[a][at]
            columns[f"p {arm}"] = np.exp(self.top_logprob[a, at])
        return pd.DataFrame(columns)

    def figure(self) -> go.Figure:
        """Change of the next token's log-probability along the text."""
        from engram_interp.figures.gatemap import show
        from engram_interp.figures.signed_map import signed_map

        labels = [f"{t} {show(token)}" for t, token in enumerate(self.tokens, start=self.first)]
        title = f"What does the memory change? {self.model}, {self.condition}"
        return signed_map(self.change[None], [self.condition], labels, title=title, unit="nats")

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON; the last position's undefined values are None."""
        defined = np.isfinite(self.change)
        change = [float(v) if ok else None for v, ok in zip(self.change, defined, strict=True)]
        return {
            "model": self.model,
            "condition": self.condition,
            "first": self.first,
            "tokens": list(self.tokens),
            "logprob": {
                arm: [float(v) if np.isfinite(v) else None for v in self.logprob[a]] for a, arm in enumerate(_ARMS)
            },
            "change": change,
            "kl": self.kl.tolist(),
            "provenance": self.provenance.as_dict(),
        }


def token_effects(
    model: Decoder,
    text: str,
    *,
    kind: str = "output_zero",
    blocks: Sequence[int] | None = None,
    branches: Sequence[int] | None = None,
    statistics: MemoryStatistics | None = None,
    positions: tuple[int, int] | None = None,
    top: int = 10,
    limit: int = MAX_TOKENS,
    **options: object,
) -> TokenEffects:
    """Compare the model with itself under an ablation, on one text.

    Args: kind, blocks, branches, statistics, options: see `engram_interp.hooks.ablate`; positions: only [start, stop),
        the start token counting as 0 (None: all); top: most probable tokens kept; limit: refuse longer texts (tokens);
        texts beyond the context are read in overlapping windows.
    Raises: ValueError for an empty or too long text, no position in it, or an ablation the model cannot have.
    """
    pieces = list(windows(model, text, limit=limit))
    ids = np.concatenate([w.tokens[0, w.keep].numpy() for w in pieces])
    begin, stop = (0, len(ids)) if positions is None else (max(0, positions[0]), min(len(ids), positions[1]))
    if begin >= stop:
        raise ValueError(f"expected positions in [0, {len(ids)}), found {positions}")
    targets = torch.from_numpy(np.append(ids[1:], -1))
    parts = []
    for window, first in _overlapping(pieces, begin, stop):
        with_memory = _exit(model, window)
        with ablate(model, kind, blocks=blocks, branches=branches, statistics=statistics, **options):  # type: ignore[arg-type]
            without = _exit(model, window)
        wanted = slice(max(begin - first, 0), stop - first)
        own = targets[first : first + len(without)][wanted]
        parts += _compare(model, with_memory[wanted], without[wanted], own, top)
    names = show_tokens(model.tokenizer, ids[begin : stop + 1].tolist())
    logprob, rank, kl, top_ids, top_logprob = (
        np.concatenate([p[i] for p in parts], axis=-1 if i < 3 else 1) for i in range(5)
    )
    shown = tuple(tuple(tuple(show_tokens(model.tokenizer, row)) for row in arm.tolist()) for arm in top_ids)
    return TokenEffects(
        model=model.identity.name,
        condition=_label(kind, blocks, branches, options),
        text=text,
        first=begin,
        tokens=tuple(names[: stop - begin]),
        following=tuple([*names[1:], ""][: stop - begin]),
        logprob=logprob,
        rank=rank,
        kl=kl,
        top_ids=top_ids,
        top_logprob=top_logprob,
        top_tokens=shown,  # type: ignore[arg-type]
        provenance=Provenance(
            {model.identity.name: model.identity.weights_sha256},
            texts_hash([text]),
            1,
            {"kind": kind, "blocks": blocks and list(blocks), "branches": branches and list(branches), **options},
        ),
    )


def _label(kind: str, blocks: Sequence[int] | None, branches: Sequence[int] | None, options: dict[str, object]) -> str:
    parts = [kind, *(f"{key}={value}" for key, value in options.items())]
    if branches is not None:
        parts.append(f"branches {', '.join(map(str, branches))}")
    return " ".join(parts) + (", all memories" if blocks is None else f", block {', '.join(map(str, blocks))}")


def _overlapping(pieces: Sequence[Window], start: int, stop: int) -> Iterator[tuple[Window, int]]:
    """The windows that add a position in [start, stop), each with the position of the first token it adds."""
    first = 0
    for window in pieces:
        added = window.tokens.shape[1] - window.keep.start
        if first < stop and first + added > start:
            yield window, first
        first += added


@torch.no_grad()
def _exit(model: Decoder, window: Window) -> Tensor:
    """Exit-ready vectors of the positions a window adds."""
    with model.lock:
        return model.exit_hidden(model.residuals(window.tokens)[-1][:, window.keep])[0]


@torch.no_grad()
def _compare(
    model: Decoder, with_memory: Tensor, without: Tensor, targets: Tensor, top: int
) -> list[tuple[np.ndarray, ...]]:
    """logprob [A, n], rank [A, n], kl [n], top ids and log-probabilities [A, n, top], by chunks of positions."""
    parts = []
    for start in range(0, len(targets), _CHUNK):
        chosen = slice(start, start + _CHUNK)
        logits = [model.unembed(hidden[chosen]).float() for hidden in (with_memory, without)]
        log_p = torch.stack(logits).log_softmax(-1)
        target, known = targets[chosen].clamp(min=0), targets[chosen] >= 0
        own = log_p.gather(-1, target.expand(2, -1).unsqueeze(-1)).squeeze(-1)
        rank = 1 + (log_p > own.unsqueeze(-1)).sum(-1)
        best = log_p.topk(min(top, log_p.shape[-1]), dim=-1)
        parts.append(
            (
                own.where(known, torch.nan).numpy(),
                rank.where(known, 0).numpy(),
                kl_divergence(*logits).numpy(),
                best.indices.numpy(),
                best.values.numpy(),
            )
        )
    return parts
