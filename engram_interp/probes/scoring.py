"""How probable does a model find each continuation, under several conditions at once?

log p(continuation | prompt) in nats, teacher-forced, summed over its tokens. Sequences of similar length share a batch,
padded on the right by repeating their last token: nothing before it can see it in a causal model. A batch is run once
per condition and only the scored positions are unembedded, a chunk at a time, so memory is one chunk of logits. Prompts
longer than the context lose their beginning, never their end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from engram_interp.models.protocol import Decoder
from engram_interp.models.text import start_tokens
from engram_interp.probes.task_items import Item, Text
from engram_interp.shapes import Int64, Tensor

_CHUNK = 512  # scored positions unembedded at a time: 16 MB of logits at a vocabulary of 8192
BATCH_TOKENS = 4096

Condition = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class EncodedChoice:
    """One continuation of one item as tokens; positions from `first` on predict the continuation."""

    item: int
    choice: int
    tokens: tuple[int, ...]
    first: int

    @property
    def targets(self) -> tuple[int, ...]:
        """The continuation's tokens."""
        return self.tokens[self.first + 1 :]


@dataclass(frozen=True, eq=False)
class Scores:
    """Per condition and item, condition 0 being the reference.

    `logprob`: nats of the right continuation; `tokens`: its length; `correct`: 0 or 1 by the item's own rule; `margin`:
    nats over the best wrong continuation, NaN without one; `kl`: KL(reference || condition), mean over the right
    continuation; `rank`: share of the wrong continuations that are less probable (1 first, 0 last, chance 1/2; ties count
    half), NaN without one.
    """

    logprob: Float[np.ndarray, "conditions n"]
    correct: Float[np.ndarray, "conditions n"]
    margin: Float[np.ndarray, "conditions n"]
    kl: Float[np.ndarray, "conditions n"]
    rank: Float[np.ndarray, "conditions n"]
    tokens: Float[np.ndarray, " n"]


def encode_items(model: Decoder, items: Sequence[Item]) -> list[EncodedChoice]:
    """Every continuation of every item as tokens.

    Raises: ValueError for an empty continuation, or one that does not fit the context.
    """
    start = start_tokens(model)
    encoded = []
    for i, item in enumerate(items):
        prompt = _ids(model, item.prompt)
        for c, choice in enumerate(item.choices):
            ids = _ids(model, choice)
            room = model.context - len(start) - len(ids)
            if not ids or room < 0 or not (start or prompt):
                raise ValueError(
                    f"item {item.id!r}: expected a continuation of 1 to {model.context - len(start)} tokens, "
                    f"found {len(ids)}"
                )
            kept = prompt[max(0, len(prompt) - room) :]
            encoded.append(EncodedChoice(i, c, (*start, *kept, *ids), len(start) + len(kept) - 1))
    return encoded


def _ids(model: Decoder, text: Text) -> list[int]:
    return model.tokenizer.encode(text, add_special_tokens=False).ids if isinstance(text, str) else list(text)


def batches(sequences: Sequence[EncodedChoice], batch_tokens: int = BATCH_TOKENS) -> Iterator[list[EncodedChoice]]:
    """Sequences of similar length together, at most `batch_tokens` with padding (or one sequence)."""
    batch: list[EncodedChoice] = []
    for sequence in sorted(sequences, key=lambda s: (len(s.tokens), s.item, s.choice)):
        if batch and (len(batch) + 1) * len(sequence.tokens) > batch_tokens:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def right_padded(rows: Sequence[tuple[int, ...]]) -> Int64[Tensor, "B T"]:
    """Rows of equal length; the last token of each is repeated."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[row[-1]] * (length - len(row))] for row in rows])


@torch.no_grad()
def score_items(
    model: Decoder,
    items: Sequence[Item],
    conditions: Sequence[Condition],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: str = "",
) -> Scores:
    """Score every item under every condition; the first is the reference (usually `nullcontext`).

    Args: conditions: make a context manager each, entered around a forward; progress: label of a progress bar, "" for
        none.
    Raises: ValueError for an item that cannot be encoded.
    """
    from tqdm import tqdm

    encoded = encode_items(model, items)
    most = max(len(item.choices) for item in items)
    shape = (len(conditions), len(items))
    logprob, greedy = np.full((*shape, most), -np.inf), np.zeros(shape)
    kl, tokens = np.zeros(shape), np.zeros(len(items))
    with tqdm(total=len(encoded) * len(conditions), desc=progress, unit="seq", disable=not progress) as bar:
        for batch in batches(encoded, batch_tokens):
            parts = _score_batch(model, batch, conditions, bar.update)
            for row, s in enumerate(batch):
                logprob[:, s.item, s.choice] = parts[0][:, row]
                if s.choice == 0:
                    greedy[:, s.item], kl[:, s.item], tokens[s.item] = (
                        parts[1][:, row],
                        parts[2][:, row],
                        len(s.targets),
                    )
    wrong = logprob[:, :, 1:].max(-1, initial=-np.inf)
    several = np.array([len(item.choices) > 1 for item in items])
    margin = np.where(several, logprob[:, :, 0] - np.where(several, wrong, 0.0), np.nan)
    correct = np.where(several, (margin > 0).astype(float), greedy)
    return Scores(logprob[:, :, 0].copy(), correct, margin, kl, _ranks(logprob, items), tokens)


def _ranks(
    logprob: Float[np.ndarray, "conditions n choices"], items: Sequence[Item]
) -> Float[np.ndarray, "conditions n"]:
    right = logprob[:, :, :1]
    there = np.arange(logprob.shape[2]) < np.array([len(item.choices) for item in items])[:, None]
    wins = np.where(there, (logprob < right) + 0.5 * (logprob == right), 0.0)[:, :, 1:].sum(-1)
    wrong = there[:, 1:].sum(-1)
    return np.where(wrong > 0, wins / np.maximum(wrong, 1), np.nan)


def _score_batch(
    model: Decoder, batch: list[EncodedChoice], conditions: Sequence[Condition], tick: Callable[[int], object]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum of log p, whether all tokens are first choices, and mean KL: each [conditions, B]."""
    tokens = right_padded([s.tokens for s in batch])
    rows = torch.tensor([r for r, s in enumerate(batch) for _ in s.targets])
    places = torch.tensor([s.first + j for s in batch for j in range(len(s.targets))])
    targets = torch.tensor([t for s in batch for t in s.targets])
    exits = []
    for condition in conditions:
        with condition():
            hidden = model.residuals(tokens)[-1]
            exits.append(model.exit_hidden(hidden[rows, places].unsqueeze(1)).squeeze(1))
        tick(len(batch))
    logprob, first, kl = (torch.zeros(len(conditions), len(targets), dtype=torch.float64) for _ in range(3))
    for start in range(0, len(targets), _CHUNK):
        part = slice(start, start + _CHUNK)
        reference: Tensor | None = None
        for c, exit_hidden in enumerate(exits):
            log_p = model.unembed(exit_hidden[part]).float().log_softmax(-1)
            reference = log_p if reference is None else reference
            logprob[c, part] = log_p.gather(1, targets[part, None]).squeeze(1).double()
            first[c, part] = (log_p.argmax(-1) == targets[part]).double()
            if c:  # the reference's divergence from itself is 0 by definition
                kl[c, part] = (reference.exp() * (reference - log_p)).sum(-1).double()
    count = torch.bincount(rows, minlength=len(batch))
    add = lambda x: torch.zeros(len(conditions), len(batch), dtype=torch.float64).index_add_(1, rows, x)  # noqa: E731
    return add(logprob).numpy(), (add(first) == count).double().numpy(), (add(kl) / count).numpy()
