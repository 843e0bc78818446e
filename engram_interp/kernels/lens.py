"""What does every layer predict, without ever holding all layers' logits?

For N tokens and L sites an unembedding gives [L, N, V] logits: gigabytes. Here tokens go through in chunks of rows; per
chunk the final layer's log-softmax is computed once and shared by all sites, every site overwrites the same buffers,
and only [L, N] numbers leave. Formulas are those of `engram_interp.measure.divergence`; the Jensen-Shannon divergence
is rearranged so that it needs one softplus: JS = ln 2 + KL(q || p) / 2 - sum (p + q) softplus(log q - log p) / 2.

Cost: one unembedding per site and token plus about ten passes over a [rows, V] chunk; memory: six such chunks (12 MB at
64 rows and V = 8192). The exact float32 form is used: bfloat16 logits cost up to 0.15 nats and are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float64
from torch.nn import functional

from engram_interp.measure.divergence import (
    LN2,
    expected_difference,
    reference_entropy,
    reference_js,
    reference_kl,
    reference_log_probabilities,
    refine_small,
)
from engram_interp.shapes import Float, Int64, Tensor

ROWS = 64


class LensError(ValueError):
    """Activations or logits from which no lens can be computed; the message names where."""


@dataclass(frozen=True, eq=False)
class LensReadings:
    """What each of L sites predicts at each of N tokens; nats except `top1` (token ids).

    `kl` KL(final || site), `reverse_kl` KL(site || final), `cross_entropy` to the true next token (NaN where there is
    none), `unigram_kl` KL(final || unigram), NaN when no unigram was given.
    """

    kl: Float[Tensor, "L N"]
    reverse_kl: Float[Tensor, "L N"]
    jensen_shannon: Float[Tensor, "L N"]
    entropy: Float[Tensor, "L N"]
    cross_entropy: Float[Tensor, "L N"]
    top1: Int64[Tensor, "L N"]
    final_top1: Int64[Tensor, " N"]
    unigram_kl: Float[Tensor, " N"]


def lens_readings(
    sites: Float[Tensor, "L N D"],
    final: Float[Tensor, "N D"],
    unembed: Callable[[Tensor], Tensor],
    targets: Int64[Tensor, " N"],
    *,
    unigram: Float[Tensor, " V"] | None = None,
    rows: int = ROWS,
) -> LensReadings:
    """All readings of all sites against the final prediction.

    Args: sites, final: vectors that passed the model's exit norm; unembed: the model's head (softcap and all), row by
        row; targets: true next token, -1 where there is none; unigram: log-probabilities to measure the final
        prediction against; rows: tokens per chunk.
    A site whose vectors equal `final` shares its log-softmax, so that its KL is exactly 0.
    Raises: LensError for logits below float32, or naming site and token of the first reading that is not finite.
    """
    count, tokens = sites.shape[:2]
    out = {f.name: sites.new_full((count, tokens), math.nan) for f in fields(LensReadings)[:5]}
    top1 = torch.zeros((count, tokens), dtype=torch.int64)
    final_top1 = torch.zeros(tokens, dtype=torch.int64)
    unigram_kl = final.new_full((tokens,), math.nan)
    buffers: _Buffers | None = None
    with torch.no_grad():
        for start in range(0, tokens, rows):
            part = slice(start, min(start + rows, tokens))
            logits = _checked(unembed(final[part]))
            buffers = buffers or _Buffers.like(logits, min(rows, tokens))
            chunk = buffers.open(logits)
            final_top1[part] = logits.argmax(-1)
            if unigram is not None:
                unigram_kl[part] = torch.linalg.vecdot(chunk.p, chunk.log_p - unigram.to(chunk.p.dtype))
            for site in range(count):
                shared = torch.equal(sites[site, part], final[part])
                top1[site, part] = chunk.load(None if shared else _checked(unembed(sites[site, part])))
                for name, values in chunk.measure(targets[part]).items():
                    out[name][site, part] = values.to(out[name].dtype)
    _require_finite(out)
    return LensReadings(**out, top1=top1, final_top1=final_top1, unigram_kl=unigram_kl)


def _checked(logits: Tensor) -> Tensor:
    if logits.dtype not in (torch.float32, torch.float64):
        raise LensError(
            f"expected logits in float32 or float64, found {logits.dtype}: rounded logits move KL by up to 0.15 nats; "
            "convert the model with .float()"
        )
    return logits


def _require_finite(out: dict[str, Tensor]) -> None:
    for name in ("kl", "reverse_kl", "jensen_shannon", "entropy"):
        finite = torch.isfinite(out[name])
        if not bool(finite.all()):
            site, token = torch.nonzero(~finite)[0].tolist()
            raise LensError(f"{name} at site {site}, token {token} is {out[name][site, token].item()}")


@dataclass
class _Buffers:
    """The [rows, V] arrays that every chunk and every site overwrite."""

    log_p: Tensor
    p: Tensor
    log_q: Tensor
    q: Tensor
    difference: Tensor
    scratch: Tensor

    @classmethod
    def like(cls, logits: Tensor, rows: int) -> _Buffers:
        return cls(*(logits.new_empty(rows, logits.shape[1]) for _ in range(6)))

    def open(self, logits: Tensor) -> _Chunk:
        """Fill in the final layer's log-softmax for one chunk."""
        chunk = _Chunk(*(getattr(self, f.name)[: len(logits)] for f in fields(self)))
        _log_softmax(logits, chunk.log_p)
        torch.exp(chunk.log_p, out=chunk.p)
        return chunk


def _log_softmax(logits: Tensor, out: Tensor) -> None:
    torch.log_softmax(logits, -1, out=out)


class _Chunk(_Buffers):
    """One chunk of tokens: the final layer's p, and q of the site that was loaded last."""

    def load(self, logits: Tensor | None) -> Tensor:
        """Take a site's logits (None: the final layer's own); gives its top-1."""
        if logits is None:
            self.log_q.copy_(self.log_p)
            self.q.copy_(self.p)
        else:
            _log_softmax(logits, self.log_q)
            torch.exp(self.log_q, out=self.q)
        torch.sub(self.log_p, self.log_q, out=self.difference)
        return self.log_q.argmax(-1) if logits is None else logits.argmax(-1)

    def measure(self, targets: Tensor) -> dict[str, Tensor]:
        """The readings of the loaded site."""
        dot = torch.linalg.vecdot
        sum_p, sum_q = self.p.sum(-1), self.q.sum(-1)
        torch.neg(self.difference, out=self.scratch)
        kl = expected_difference(self.p, self.difference, sum_p, sum_q)
        reverse = expected_difference(self.q, self.scratch, sum_q, sum_p)
        softplus = functional.softplus(self.scratch, threshold=40.0)
        js = (LN2 + reverse / 2 - (dot(self.p, softplus) + dot(self.q, softplus)) / 2).clamp(0, LN2)
        truth = self.log_q.gather(1, targets.clamp_min(0)[:, None]).squeeze(1) - sum_q.log()
        return {
            "kl": refine_small(self.p, self.difference, kl),
            "reverse_kl": refine_small(self.q, self.scratch, reverse),
            "jensen_shannon": js,
            "entropy": sum_q.log() - dot(self.q, self.log_q) / sum_q,
            "cross_entropy": torch.where(targets >= 0, -truth, math.nan),
        }


def lens_readings_reference(
    sites: Float64[np.ndarray, "L N V"], final: Float64[np.ndarray, "N V"], targets: Int64[np.ndarray, " N"]
) -> dict[str, Float64[np.ndarray, "L N"]]:
    """The obvious version: all logits at once, float64."""
    final = np.broadcast_to(final, sites.shape)
    log_q = reference_log_probabilities(sites)
    truth = np.take_along_axis(log_q, np.maximum(targets, 0)[None, :, None], -1)[..., 0]
    return {
        "kl": reference_kl(final, sites),
        "reverse_kl": reference_kl(sites, final),
        "jensen_shannon": reference_js(final, sites),
        "entropy": reference_entropy(sites),
        "cross_entropy": np.where(targets >= 0, -truth, np.nan),
    }
