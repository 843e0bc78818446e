"""What does next-token prediction cost, without holding the logits?

Mean cross-entropy of a tied unembedding, one chunk of rows at a time: a chunk's logits stay in the processor's cache,
and its gradient is taken before the next chunk overwrites them. FLOPs as the plain version; memory one chunk instead of
[n, V].
"""

from __future__ import annotations

import torch

from engram_interp.shapes import Float, Int64, Tensor

_CHUNK = 256  # 256 x 8192 logits in fp32 are 8 MB, a quarter of a usual last-level cache


def cross_entropy_reference(
    hidden: Float[Tensor, "n D"], unembedding: Float[Tensor, "V D"], targets: Int64[Tensor, " n"]
) -> Float[Tensor, ""]:
    """The obvious version."""
    return torch.nn.functional.cross_entropy(hidden @ unembedding.T, targets)


# The schema is written out: torch would read it from annotations, which the tests' jaxtyping hook wraps.
@torch.library.custom_op(
    "engram_interp::chunked_cross_entropy",
    mutates_args=(),
    schema="(Tensor hidden, Tensor unembedding, Tensor targets) -> (Tensor, Tensor, Tensor)",
)
def _chunked(hidden: Tensor, unembedding: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if torch.is_autocast_enabled("cpu"):
        return _chunked_rounded(hidden, unembedding, targets, torch.get_autocast_dtype("cpu"))
    n = len(hidden)
    grad_hidden, grad_unembedding = torch.empty_like(hidden), torch.zeros_like(unembedding)
    logits = hidden.new_empty(min(_CHUNK, n), len(unembedding))
    total = hidden.new_zeros(())
    for start in range(0, n, _CHUNK):
        h, y = hidden[start : start + _CHUNK], targets[start : start + _CHUNK, None]
        z = torch.mm(h, unembedding.T, out=logits[: len(h)])
        peak = z.amax(1, keepdim=True)
        true = z.gather(1, y)
        z.sub_(peak).exp_()
        mass = z.sum(1, keepdim=True)
        total += (mass.log() + peak - true).sum()
        z.mul_(1 / (mass * n)).scatter_add_(1, y, torch.full_like(mass, -1 / n))
        torch.mm(z, unembedding, out=grad_hidden[start : start + _CHUNK])
        grad_unembedding.addmm_(z.T, h)
    return total / n, grad_hidden, grad_unembedding


def _chunked_rounded(
    hidden: Tensor, unembedding: Tensor, targets: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with rounded operands and logits; sums over tokens and chunks stay in float32."""
    n, weights = len(hidden), unembedding.to(dtype)
    grad_hidden, grad_unembedding = torch.empty_like(hidden), torch.zeros_like(unembedding)
    total = hidden.new_zeros(())
    for start in range(0, n, _CHUNK):
        h, y = hidden[start : start + _CHUNK].to(dtype), targets[start : start + _CHUNK, None]
        p = torch.softmax(torch.mm(h, weights.T), 1)
        total -= p.gather(1, y).float().log().sum()
        p.scatter_add_(1, y, p.new_full(y.shape, -1.0))
        grad_hidden[start : start + _CHUNK] = torch.mm(p, weights)
        grad_unembedding += torch.mm(p.T, h)
    return total / n, grad_hidden.div_(n), grad_unembedding.div_(n)


@_chunked.register_fake
def _(hidden, unembedding, targets):  # noqa: ANN001, ANN202
    return hidden.new_empty(()), torch.empty_like(hidden), torch.empty_like(unembedding)


def _save_for_backward(ctx, inputs, output) -> None:  # noqa: ANN001
    _, grad_hidden, grad_unembedding = output
    ctx.save_for_backward(grad_hidden, grad_unembedding)
    ctx.mark_non_differentiable(grad_hidden, grad_unembedding)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):  # noqa: ANN001, ANN002, ANN202
    if grad is None:
        return None, None, None
    grad_hidden, grad_unembedding = ctx.saved_tensors
    return grad_hidden * grad, grad_unembedding * grad, None


_chunked.register_autograd(_backward, setup_context=_save_for_backward)


def cross_entropy(
    hidden: Float[Tensor, "n D"], unembedding: Float[Tensor, "V D"], targets: Int64[Tensor, " n"]
) -> Float[Tensor, ""]:
    """Mean nats per token of `softmax(hidden @ unembedding.T)` against `targets`; same value as the reference."""
    return _chunked(hidden, unembedding, targets)[0]
