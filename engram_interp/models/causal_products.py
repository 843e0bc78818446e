"""How is causal attention trained fast in bfloat16 on a CPU?

torch's fused CPU kernel computes bfloat16 attention at the speed of float32. Here each block of queries is two batched
products with the keys up to its end and a softmax between them, and the backward pass is written out: at T = 256 it takes
less than half the time (`experiments/LOG.md`), for T^2 / 2 probabilities kept per head. Products accumulate in float32;
scores and probabilities are rounded to the operands' dtype, so this is for training: inference takes the exact kernel.
"""

from __future__ import annotations

import math

import torch

from engram_interp.shapes import Float, Tensor

_BLOCK = 64  # queries at once: five eighths of the full square's work at T = 256, in products still large enough


def causal_attention_reference(
    q: Float[Tensor, "B H T head"], k: Float[Tensor, "B H T head"], v: Float[Tensor, "B H T head"]
) -> Float[Tensor, "B H T head"]:
    """The obvious version."""
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -torch.inf).softmax(-1) @ v


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + _BLOCK, length)) for start in range(0, length, _BLOCK)]


def _mask(start: int, end: int, like: Tensor) -> Tensor:
    """0 where a query of the block may look, -inf in its future."""
    return torch.full((end - start, end), -torch.inf, dtype=like.dtype, device=like.device).triu(start + 1)


# Schemas are written out: torch would read them from annotations, which the tests' jaxtyping hook wraps.
@torch.library.custom_op(
    "engram_interp::causal_attention", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)"
)
def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, scale, kept = torch.empty_like(q), q.shape[-1] ** -0.5, []
    for s, e in _blocks(q.shape[1]):
        p = torch.baddbmm(_mask(s, e, q), q[:, s:e], k[:, :e].mT, alpha=scale).softmax(-1)
        out[:, s:e] = p @ v[:, :e]
        kept.append(p.flatten())
    return out, torch.cat(kept)


@_causal_attention.register_fake
def _(q, k, v):  # noqa: ANN001, ANN202
    return torch.empty_like(q), q.new_empty(q.shape[0] * sum((e - s) * e for s, e in _blocks(q.shape[1])))


@torch.library.custom_op(
    "engram_interp::causal_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor kept) -> (Tensor, Tensor, Tensor)",
)
def _causal_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = q.shape
    grad_q, scale, used = torch.empty_like(q), width**-0.5, 0
    grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
    for s, e in _blocks(length):
        size = batch * (e - s) * e
        p = kept[used : used + size].view(batch, e - s, e)
        used += size
        g = grad[:, s:e]
        ds = torch.ops.aten._softmax_backward_data(g @ v[:, :e].mT, p, -1, p.dtype)
        torch.mul(ds @ k[:, :e], scale, out=grad_q[:, s:e])
        grad_k[:, :e] += ds.mT @ q[:, s:e]
        grad_v[:, :e] += p.mT @ g
    return grad_q, grad_k.mul_(scale), grad_v


@_causal_attention_backward.register_fake
def _(grad, q, k, v, kept):  # noqa: ANN001, ANN202
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_for_backward(ctx, inputs, output) -> None:  # noqa: ANN001
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):  # noqa: ANN001, ANN002, ANN202
    return (None, None, None) if grad is None else _causal_attention_backward(grad.contiguous(), *ctx.saved_tensors)


_causal_attention.register_autograd(_backward, setup_context=_save_for_backward)


def causal_attention(
    q: Float[Tensor, "B H T head"], k: Float[Tensor, "B H T head"], v: Float[Tensor, "B H T head"]
) -> Float[Tensor, "B H T head"]:
    """softmax(q k' / sqrt(head) + causal mask) v; same value as the reference up to the rounding of the dtype."""
    flat = [part.flatten(0, 1).contiguous() for part in (q, k, v)]
    return _causal_attention(*flat)[0].view_as(q)
