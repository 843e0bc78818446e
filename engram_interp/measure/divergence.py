"""How far apart are two next-token distributions?

All in nats, from logits z through log-softmax, never through probabilities and without an epsilon: with log p = z -
logsumexp z,

    KL(p || q) = sum p (log p - log q)           JS = (KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2, at most ln 2
    H(p) = -sum p log p                          CE = -log p(true token)

For a small change of the logits, x = (z_q - z_p) - E_p[z_q - z_p] has E_p[x] = 0, so KL = log1p(E_p[expm1(x) - x]):
every term is non-negative and nothing cancels (`small_kl`). Cost: one pass over [n, v]; `engram_interp.kernels.lens`
does many layers in bounded memory. Misleads: KL is asymmetric and right-skewed over tokens, so a mean and a median can
disagree about two models; logits that were rounded to bfloat16 before they get here are already wrong by up to 0.15
nats.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float64

from engram_interp.shapes import Bool, Float, Int64, Tensor

LN2 = math.log(2)


def log_probabilities(logits: Float[Tensor, "*n v"]) -> Float[Tensor, "*n v"]:
    """log softmax over the last axis, in float32 or in float64 when the input is.

    Raises: ValueError naming the first token whose logits are not all finite.
    """
    result = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    finite = torch.isfinite(result).all(-1)
    if not bool(finite.all()):
        where = torch.nonzero(~finite)[0].tolist()
        token = where[0] if len(where) == 1 else where
        raise ValueError(f"expected finite logits, found a value that is not at token {token}")
    return result


def kl_divergence(final: Float[Tensor, "n v"], layer: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    """KL(final || layer): the information lost by leaving the model at `layer`.

    Args: final, layer: logits, any float dtype; computed in float32 or better.
    Returns: nats per token, at least -1e-6. Raises: ValueError naming the first non-finite token.
    """
    log_p, log_q = log_probabilities(final), log_probabilities(layer)
    p, difference = log_p.exp(), log_p - log_q
    return refine_small(p, difference, expected_difference(p, difference, p.sum(-1), log_q.exp().sum(-1)))


def expected_difference(
    p: Float[Tensor, "n v"], difference: Float[Tensor, "n v"], sum_p: Float[Tensor, " n"], sum_q: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """KL(p || q) = sum p difference, without the rounding of the two logsumexps.

    That rounding is one constant per token, so it shows as sums of p and of q that are not 1, and for a KL of tens of
    nats it is the largest error of all. Args: difference: log p - log q.
    """
    return torch.linalg.vecdot(p, difference) / sum_p - sum_p.log() + sum_q.log()


def reverse_kl(final: Float[Tensor, "n v"], layer: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    """KL(layer || final), nats per token.

    Raises: ValueError naming the first non-finite token.
    """
    return kl_divergence(layer, final)


def jensen_shannon(final: Float[Tensor, "n v"], layer: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    """Jensen-Shannon divergence in nats, in [0, ln 2] (rounding is clamped).

    Raises: ValueError naming the first non-finite token.
    """
    p, q = log_probabilities(final), log_probabilities(layer)
    m = torch.logaddexp(p, q) - LN2
    js = torch.linalg.vecdot(p.exp(), p - m) + torch.linalg.vecdot(q.exp(), q - m)
    return (js / 2).clamp(0, LN2)


def entropy(logits: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    """Entropy in nats.

    Raises: ValueError naming the first non-finite token.
    """
    log_p = log_probabilities(logits)
    p = log_p.exp()
    return p.sum(-1).log() - torch.linalg.vecdot(p, log_p) / p.sum(-1)


def cross_entropy(logits: Float[Tensor, "n v"], targets: Int64[Tensor, " n"]) -> Float[Tensor, " n"]:
    """-log p(target), nats.

    Raises: ValueError for a target outside the vocabulary, or naming the first non-finite token.
    """
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[-1]:
        raise ValueError(
            f"expected targets in [0, {logits.shape[-1]}), found {int(targets.min())} to {int(targets.max())}"
        )
    return -log_probabilities(logits).gather(1, targets[:, None]).squeeze(1)


def top1_agreement(final: Float[Tensor, "n v"], layer: Float[Tensor, "n v"]) -> Bool[Tensor, " n"]:
    """Whether both predict the same token (the lowest id among equals).

    Raises: ValueError naming the first non-finite token.
    """
    for logits in (final, layer):
        log_probabilities(logits)
    return final.argmax(-1) == layer.argmax(-1)


def small_kl(base: Float[Tensor, "n v"], changed: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    """KL(base || changed) for interventions that change little: relative error about 1e-5 down to 1e-8 nats.

    Never negative. The logits' difference is taken before any normalisation; where expm1 overflows, the plain form is
    used.
    Raises: ValueError naming the first non-finite token.
    """
    p = log_probabilities(base)
    plain = torch.linalg.vecdot(p.exp(), p - log_probabilities(changed))
    small = _small_form(p.exp(), changed.to(p.dtype) - base.to(p.dtype))
    return torch.where(torch.isfinite(small), small, plain)


SMALL = 1e-2  # nats below which the small form is more exact than the plain sum


def refine_small(
    probability: Float[Tensor, "n v"], difference: Float[Tensor, "n v"], kl: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Recompute by the small form the few rows of a plain KL below `SMALL`; rows that are exactly 0 are left.

    Args: probability: p; difference: log p - log q; kl: its plain expectation, updated in place and returned.
    """
    rows = torch.nonzero((kl < SMALL) & (kl != 0)).squeeze(1)
    if len(rows):
        small = _small_form(probability[rows], -difference[rows])
        kl[rows] = torch.where(torch.isfinite(small), small, kl[rows])
    return kl


def _small_form(probability: Float[Tensor, "n v"], change: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    x = change - torch.linalg.vecdot(probability, change)[:, None]
    return torch.log1p(torch.linalg.vecdot(probability, expm1_minus(x)))


def expm1_minus(x: Float[Tensor, "*n v"]) -> Float[Tensor, "*n v"]:
    """expm1(x) - x, by its series near 0, where the subtraction loses all digits."""
    return torch.where(x.abs() < 0.1, x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x / 120))), torch.expm1(x) - x)


# -- the obvious versions, in float64, that the tests hold the others against ------------------------------------------


def reference_log_probabilities(logits: Float64[np.ndarray, "*n v"]) -> Float64[np.ndarray, "*n v"]:
    """log softmax in float64."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def reference_kl(final: Float64[np.ndarray, "*n v"], layer: Float64[np.ndarray, "*n v"]) -> Float64[np.ndarray, "*n"]:
    """KL(final || layer) in float64."""
    p, q = reference_log_probabilities(final), reference_log_probabilities(layer)
    return (np.exp(p) * (p - q)).sum(-1)


def reference_js(final: Float64[np.ndarray, "*n v"], layer: Float64[np.ndarray, "*n v"]) -> Float64[np.ndarray, "*n"]:
    """Jensen-Shannon divergence in float64."""
    p, q = reference_log_probabilities(final), reference_log_probabilities(layer)
    m = np.logaddexp(p, q) - LN2
    return ((np.exp(p) * (p - m)).sum(-1) + (np.exp(q) * (q - m)).sum(-1)) / 2


def reference_entropy(logits: Float64[np.ndarray, "*n v"]) -> Float64[np.ndarray, "*n"]:
    """Entropy in float64."""
    p = reference_log_probabilities(logits)
    return -(np.exp(p) * p).sum(-1)
