"""How far does a small change of the hidden vector move the prediction?

With d = h_changed - h_final, mean = sum_v p_v w_v and x_v = d . (w_v - mean), E_p[x] = 0 and

    KL(final || changed) = log1p( sum_v p_v (expm1(x_v) - x_v) )

Every term is non-negative and the change is never a difference of logits, so the relative error stays near 1e-6 down to
1e-8 nats, where a difference of two log-partitions has lost every digit and is often negative.
Cost: two products of 2 N V D; memory: two tiles. Not finite where some x_v exceeds 88: use the identity of
`engram_interp.kernels.lens_kl` there. Needs an unembedding without bias or soft cap.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float64

from engram_interp.kernels.partition import COLUMNS, ROWS, Partition
from engram_interp.measure.divergence import expm1_minus
from engram_interp.shapes import Float, Tensor


@torch.no_grad()
def delta_kl(
    final: Float[Tensor, "N D"], change: Float[Tensor, "N D"], head: Float[Tensor, "V D"], base: Partition
) -> Float64[Tensor, " N"]:
    """KL(final || final + change) in nats.

    Args: base: the exact partition of `final`, with its mean.
    Raises: ValueError for a base without a mean.
    """
    if base.mean is None:
        raise ValueError("expected the partition of the final vectors with mean=True, found one without")
    blocks = zip(final.split(ROWS), change.split(ROWS), base.log_z.split(ROWS), base.mean.split(ROWS), strict=True)
    parts = [_delta_rows(h, d, log_z, mean, head) for h, d, log_z, mean in blocks]
    return torch.cat(parts) if parts else base.log_z


def _delta_rows(final: Tensor, change: Tensor, log_z: Tensor, mean: Tensor, head: Tensor) -> Tensor:
    centre = torch.linalg.vecdot(change.double(), mean.double()).to(final.dtype)[:, None]
    shift = log_z.to(final.dtype)[:, None]
    total = torch.zeros_like(log_z)
    for start in range(0, len(head), COLUMNS):
        columns = head[start : start + COLUMNS].to(final.dtype).T
        p = torch.mm(final, columns).sub_(shift).exp_()
        x = torch.mm(change, columns).sub_(centre)
        total += torch.linalg.vecdot(p, expm1_minus(x))
    return torch.log1p(total)


def delta_reference(
    final: Float64[np.ndarray, "N D"], change: Float64[np.ndarray, "N D"], head: Float64[np.ndarray, "V D"]
) -> Float64[np.ndarray, " N"]:
    """The obvious version, from float64 logits in extended precision."""
    logits, changed = (np.longdouble(x @ head.T) for x in (final, final + change))
    log_p, log_q = (z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)
                    for z in (logits, changed))  # fmt: skip
    return (np.exp(log_p) * (log_p - log_q)).sum(1).astype(np.float64)
