"""How probable does a model find each continuation, under several conditions at once?

log p(continuation | prompt) in nats, teacher-forced, summed over its tokens. Nothing is computed twice: a prefix that
several continuations of an item share is read and unembedded once, the last token of a continuation is never read, and
a condition starts at the first block it changes, from the streams of the reference. Sequences of similar length share a
batch, padded on the right by repeating their last token (nothing before it can see it in a causal model), and only the
positions that predict something are unembedded, a few rows of logits at a time. Prompts longer than the context lose
their beginning, never their end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float, Shaped

from engram_interp.models.batching import BATCH_TOKENS, batches, right_padded
from engram_interp.models.protocol import Decoder
from engram_interp.models.text import start_tokens
from engram_interp.probes.task_items import Item, Text
from engram_interp.shapes import Int64, Tensor

_ROWS = 64  # positions unembedded at a time: their logits (2 MB at a vocabulary of 8192) stay in the cache of a core

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


@dataclass(frozen=True)
class Run:
    """A sequence to read. After `places[k]` it is asked for `asked[k]`, the (choice, target) pairs that follow there."""

    item: int
    tokens: tuple[int, ...]
    places: tuple[int, ...]
    asked: tuple[tuple[tuple[int, int], ...], ...]


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


def shared_runs(encoded: Sequence[EncodedChoice]) -> list[Run]:
    """The sequences that hold every predicting prefix of every item once; `encoded` is in the order of its items."""
    runs = []
    for item, group in groupby(encoded, key=lambda e: e.item):
        asked: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        hosts: list[tuple[tuple[int, ...], list[tuple[int, ...]]]] = []
        for choice in sorted(group, key=lambda e: -len(e.tokens)):  # the longest can hold prefixes of the others
            prefixes = [choice.tokens[: p + 1] for p in range(choice.first, len(choice.tokens) - 1)]
            if new := [prefix for prefix in prefixes if prefix not in asked]:
                hosts.append((prefixes[-1], new))
            for prefix, target in zip(prefixes, choice.targets, strict=True):
                asked.setdefault(prefix, []).append((choice.choice, target))
        runs += [
            Run(item, tokens, tuple(len(p) - 1 for p in new), tuple(tuple(asked[p]) for p in new))
            for tokens, new in hosts
        ]
    return runs


@torch.no_grad()
def score_items(
    model: Decoder,
    items: Sequence[Item],
    conditions: Sequence[Condition],
    *,
    first_blocks: Sequence[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: str = "",
) -> Scores:
    """Score every item under every condition; the first is the reference (usually `nullcontext`).

    Args: conditions: make a context manager each, entered around a forward; first_blocks: up to which block each
        condition leaves the reference as it is (0: run it whole, as None does for all); progress: label of a progress
        bar, "" for none.
    Raises: ValueError for an item that cannot be encoded, or another number of first blocks than of conditions.
    """
    from tqdm import tqdm

    starts = [0] * len(conditions) if first_blocks is None else list(first_blocks)
    if len(starts) != len(conditions):
        raise ValueError(f"expected a first block per condition ({len(conditions)}), found {len(starts)}")
    encoded = encode_items(model, items)
    several = np.array([len(item.choices) > 1 for item in items])
    shape = (len(conditions), len(items))
    logprob = np.full((*shape, max(len(item.choices) for item in items)), -np.inf)
    logprob[:, [e.item for e in encoded], [e.choice for e in encoded]] = 0.0
    solved, kl = np.ones(shape), np.zeros(shape)
    lengths = np.array([len(e.targets) for e in encoded if e.choice == 0], dtype=float)
    runs = shared_runs(encoded)
    with tqdm(total=len(runs) * len(conditions), desc=progress, unit="seq", disable=not progress) as bar:
        for batch in batches(runs, batch_tokens):
            asked = _Asked.of_batch(batch)
            exits = []
            for exit_hidden in _exits(model, batch, asked, conditions, starts):
                exits.append(exit_hidden)
                bar.update(len(batch))
            found, first, divergence = _read(model, exits, asked, greedy=not several.all())
            every, right = np.arange(len(conditions))[:, None], asked.item[asked.right]
            np.add.at(logprob, (every, asked.item, asked.choice), found)
            np.multiply.at(solved, (every, right), first)
            np.add.at(kl, (every, right), divergence)
    wrong = logprob[:, :, 1:].max(-1, initial=-np.inf)
    margin = np.where(several, logprob[:, :, 0] - np.where(several, wrong, 0.0), np.nan)
    correct = np.where(several, (margin > 0).astype(float), solved)
    return Scores(logprob[:, :, 0].copy(), correct, margin, kl / lengths, _ranks(logprob, items), lengths)


def _ranks(
    logprob: Float[np.ndarray, "conditions n choices"], items: Sequence[Item]
) -> Float[np.ndarray, "conditions n"]:
    right = logprob[:, :, :1]
    there = np.arange(logprob.shape[2]) < np.array([len(item.choices) for item in items])[:, None]
    wins = np.where(there, (logprob < right) + 0.5 * (logprob == right), 0.0)[:, :, 1:].sum(-1)
    wrong = there[:, 1:].sum(-1)
    return np.where(wrong > 0, wins / np.maximum(wrong, 1), np.nan)


@dataclass(frozen=True, eq=False)
class _Asked:
    """What a batch is asked: unembed at (row, place), then look up a target in the row `of` those.

    Places that predict a token of a right continuation come first, `rights` of them; `right` finds their pairs, in the
    same order.
    """

    row: Int64[Tensor, " places"]
    place: Int64[Tensor, " places"]
    rights: int
    of: Int64[Tensor, " pairs"]
    target: Int64[Tensor, " pairs"]
    item: Shaped[np.ndarray, " pairs"]
    choice: Shaped[np.ndarray, " pairs"]
    right: Shaped[np.ndarray, " rights"]

    @classmethod
    def of_batch(cls, batch: Sequence[Run]) -> _Asked:
        every = [
            (r, place, pairs) for r, run in enumerate(batch) for place, pairs in zip(run.places, run.asked, strict=True)
        ]
        every.sort(key=lambda e: all(choice for choice, _ in e[2]))  # False first: stable, so runs keep their order
        pairs = [
            (u, batch[r].item, choice, target) for u, (r, _, asked) in enumerate(every) for choice, target in asked
        ]
        of, item, choice, target = (np.array(column) for column in zip(*pairs, strict=True))
        right = np.flatnonzero(choice == 0)
        row, place = (torch.tensor([e[i] for e in every]) for i in (0, 1))
        return cls(row, place, len(right), torch.from_numpy(of), torch.from_numpy(target), item, choice, right)


def _exits(
    model: Decoder, batch: Sequence[Run], asked: _Asked, conditions: Sequence[Condition], starts: Sequence[int]
) -> Iterator[Float[Tensor, "places D"]]:
    """What the unembedding reads at every place, condition by condition."""
    tokens = right_padded([run.tokens for run in batch])
    sites: list[Tensor] = []
    for condition, start in zip(conditions, starts, strict=True):
        with condition():
            if not sites:
                sites = model.residuals(tokens)
                hidden = sites[-1]
            else:
                hidden = model.resume(tokens, sites[start], start) if start else model.residuals(tokens)[-1]
            exit_hidden = model.exit_hidden(hidden[asked.row, asked.place].unsqueeze(1)).squeeze(1)
        yield exit_hidden


def _read(
    model: Decoder, exits: Sequence[Float[Tensor, "places D"]], asked: _Asked, *, greedy: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log p of every pair; whether each right token is the first choice (0 unless `greedy`), and the KL there.

    All [conditions, ...], float64.
    """
    pairs, rights = (len(exits), len(asked.of)), (len(exits), asked.rights)
    logprob, first, kl = torch.zeros(pairs), torch.zeros(rights), torch.zeros(rights)
    for start in range(0, len(asked.row), _ROWS):
        stop = start + _ROWS
        here = slice(*torch.searchsorted(asked.of, torch.tensor([start, stop])).tolist())
        of, target = asked.of[here] - start, asked.target[here]
        right = slice(start, min(stop, asked.rights))
        count = max(0, right.stop - start)
        answers = asked.target[asked.right][right]
        reference = probability = torch.empty(0)
        for c, exit_hidden in enumerate(exits):
            log_p = model.unembed(exit_hidden[start:stop]).float().log_softmax(-1)
            logprob[c, here] = log_p[of, target]
            if not count:
                continue
            log_p = log_p[:count]
            if greedy:
                first[c, right] = (log_p.argmax(-1) == answers).float()
            if c == 0:
                reference, probability = log_p, log_p.exp()
            else:  # the reference's divergence from itself is 0 by definition
                kl[c, right] = torch.linalg.vecdot(probability, reference - log_p)
    return logprob.double().numpy(), first.double().numpy(), kl.double().numpy()
