"""Which experts does a token use, and what do they compute?

Fine-grained mixture of experts: one shared SwiGLU expert, plus the top k of E routed ones weighted by their
renormalised router probability. No token is ever dropped and no capacity is set, so a token's output does not depend on
its batch. The routed product is one opaque operator with its own backward: rows are sorted by expert and multiplied
slice by slice, so weight gradients are written in place (indexing a stacked parameter per expert would allocate a
full-size zero gradient each time).
"""

from __future__ import annotations

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint

from engram_interp.shapes import Float, Int64, Tensor

# A matrix product of a few rows takes another code path than one of many, and its bits differ. Experts always see a
# multiple of this many rows (zeros fill up), so that a token's output does not depend on which tokens share its expert.
_ALIGN = 4


def routed_swiglu_reference(
    x: Float[Tensor, "n D"],
    indices: Int64[Tensor, "n k"],
    weights: Float[Tensor, "n k"],
    w_in: Float[Tensor, "E D W2"],
    w_out: Float[Tensor, "E W D"],
) -> Float[Tensor, "n D"]:
    """The obvious version: every expert on every token, then the weighted choice."""
    gate, up = torch.einsum("nd,edw->new", x, w_in).chunk(2, dim=-1)
    every = torch.einsum("new,ewd->ned", nn.functional.silu(gate) * up, w_out)
    return (every.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[1])) * weights.unsqueeze(-1)).sum(1)


def _slices(indices: Tensor, experts: int) -> list[tuple[int, int, int]]:
    """(expert, first row, last row) of every expert in use, rows sorted by expert."""
    ends = torch.bincount(indices.flatten(), minlength=experts).cumsum(0).tolist()
    return [(e, s, t) for e, (s, t) in enumerate(zip([0, *ends], ends, strict=False)) if t > s]


def _inverse(order: Tensor) -> Tensor:
    """The inverse permutation, without sorting again."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


# Schemas are written out: torch would read them from annotations, which the tests' jaxtyping hook wraps.
def _aligned(indices: Tensor, order: Tensor, experts: int) -> tuple[list[tuple[int, int, int]], Tensor]:
    """Slices as `_slices`, each grown to a multiple of `_ALIGN` rows, and where in them every sorted row goes."""
    counts = torch.bincount(indices.flatten(), minlength=experts)
    grown = (counts + _ALIGN - 1).div(_ALIGN, rounding_mode="floor") * _ALIGN
    ends = grown.cumsum(0)
    shift = ends - grown - (counts.cumsum(0) - counts)
    places = torch.arange(len(order), device=order.device) + shift[indices.flatten()[order]]
    bounds = ends.tolist()
    return [(e, s, t) for e, (s, t) in enumerate(zip([0, *bounds], bounds, strict=False)) if t > s], places


@torch.library.custom_op(
    "engram_interp::routed_swiglu",
    mutates_args=(),
    schema="(Tensor x, Tensor indices, Tensor weights, Tensor w_in, Tensor w_out) -> (Tensor, Tensor, Tensor, Tensor)",
)
# Products of a few rows gain nothing from bfloat16, and every new shape is compiled anew.
@torch.autocast("cpu", enabled=False)
def _routed_swiglu(
    x: Tensor, indices: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, width, experts = indices.shape[1], w_out.shape[1], len(w_in)
    order = indices.flatten().argsort(stable=True)
    slices, places = _aligned(indices, order, experts)
    rows = x.new_zeros(len(order) + (_ALIGN - 1) * experts, x.shape[1])
    rows.index_copy_(0, places, x.index_select(0, order // k))
    pre = x.new_empty(len(rows), 2 * width)
    for e, s, t in slices:
        torch.mm(rows[s:t], w_in[e], out=pre[s:t])
    hidden = nn.functional.silu(pre[:, :width]) * pre[:, width:]
    routed = torch.empty_like(rows)
    for e, s, t in slices:
        torch.mm(hidden[s:t], w_out[e], out=routed[s:t])
    by_token = routed.index_select(0, places[_inverse(order)])
    pre = pre.index_select(0, places)
    out = torch.einsum("nkd,nk->nd", by_token.view(-1, k, x.shape[1]), weights)
    return out, order, pre, by_token


@_routed_swiglu.register_fake
def _(x, indices, weights, w_in, w_out):  # noqa: ANN001, ANN202
    n = indices.numel()
    return torch.empty_like(x), indices.new_empty(n), x.new_empty(n, w_in.shape[2]), x.new_empty(n, x.shape[1])


@torch.library.custom_op(
    "engram_interp::routed_swiglu_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor indices, Tensor weights, Tensor w_in, Tensor w_out, "
    "Tensor order, Tensor pre, Tensor by_token) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _routed_swiglu_backward(
    grad: Tensor,
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    order: Tensor,
    pre: Tensor,
    by_token: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, width = indices.shape[1], w_out.shape[1]
    slices = _slices(indices, w_in.shape[0])
    tokens = order // k
    grad_weights = torch.einsum("nkd,nd->nk", by_token.view(-1, k, x.shape[1]), grad)
    grad_routed = grad.index_select(0, tokens).mul_(weights.flatten()[order].unsqueeze(-1))
    gate, up = pre[:, :width], pre[:, width:]
    silu = nn.functional.silu(gate)
    hidden = silu * up
    grad_hidden, grad_w_out, grad_w_in = torch.empty_like(hidden), torch.empty_like(w_out), torch.empty_like(w_in)
    used = {e for e, _, _ in slices}
    for e in (e for e in range(len(w_in)) if e not in used):  # zeroing all of them costs as much as a product
        grad_w_out[e].zero_()
        grad_w_in[e].zero_()
    for e, s, t in slices:
        torch.mm(grad_routed[s:t], w_out[e].t(), out=grad_hidden[s:t])
        torch.mm(hidden[s:t].t(), grad_routed[s:t], out=grad_w_out[e])
    grad_pre = torch.empty_like(pre)
    grad_pre[:, :width] = torch.ops.aten.silu_backward(grad_hidden * up, gate)
    torch.mul(grad_hidden, silu, out=grad_pre[:, width:])
    rows, grad_rows = x.index_select(0, tokens), torch.empty_like(grad_routed)
    for e, s, t in slices:
        torch.mm(grad_pre[s:t], w_in[e].t(), out=grad_rows[s:t])
        torch.mm(rows[s:t].t(), grad_pre[s:t], out=grad_w_in[e])
    by_slot = grad_rows.index_select(0, _inverse(order))
    return by_slot.view(-1, k, x.shape[1]).sum(1), grad_weights, grad_w_in, grad_w_out


@_routed_swiglu_backward.register_fake
def _(grad, x, indices, weights, w_in, w_out, order, pre, by_token):  # noqa: ANN001, ANN202
    return torch.empty_like(x), torch.empty_like(weights), torch.empty_like(w_in), torch.empty_like(w_out)


def _save_for_backward(ctx, inputs, output) -> None:  # noqa: ANN001
    _, order, pre, by_token = output
    ctx.save_for_backward(*inputs, order, pre, by_token)
    ctx.mark_non_differentiable(order, pre, by_token)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):  # noqa: ANN001, ANN002, ANN202
    if grad is None:
        return None, None, None, None, None
    grad_x, grad_weights, grad_w_in, grad_w_out = _routed_swiglu_backward(grad.contiguous(), *ctx.saved_tensors)
    return grad_x, None, grad_weights, grad_w_in, grad_w_out


_routed_swiglu.register_autograd(_backward, setup_context=_save_for_backward)


def routed_swiglu(
    x: Float[Tensor, "n D"],
    indices: Int64[Tensor, "n k"],
    weights: Float[Tensor, "n k"],
    w_in: Float[Tensor, "E D W2"],
    w_out: Float[Tensor, "E W D"],
) -> Float[Tensor, "n D"]:
    """The same as `routed_swiglu_reference`, computing only the chosen experts. Gate half of `w_in` first."""
    return _routed_swiglu(x, indices, weights, w_in, w_out)[0]


class SharedExpert(nn.Module):
    """A SwiGLU that every token passes."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w_in = nn.Linear(width, 2 * hidden, bias=False)
        self.w_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """W_out (silu(gate) * up)."""
        gate, up = self.w_in(x).chunk(2, dim=-1)
        return self.w_out(nn.functional.silu(gate) * up)


class DenseFeedForward(SharedExpert):
    """One SwiGLU in the place of experts; its load-balance loss is 0."""

    def forward(self, x: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "B T D"], Float[Tensor, ""]]:  # type: ignore[override]
        """The output, and 0."""
        return super().forward(x), x.new_zeros(())


class MixtureOfExperts(nn.Module):
    """One shared expert plus the top k of E routed experts; router records are [B, T, ...]."""

    def __init__(self, width: int, routed: int, active: int, expert_width: int, shared_width: int) -> None:
        super().__init__()
        self.active = active
        self.router = nn.Linear(width, routed, bias=False)
        self.w_in = nn.Parameter(torch.empty(routed, width, 2 * expert_width))
        self.w_out = nn.Parameter(torch.empty(routed, expert_width, width))
        self.shared = SharedExpert(width, shared_width)
        self.hook_router_logits = HookPoint()
        self.hook_expert_indices = HookPoint()
        self.hook_expert_weights = HookPoint()

    def forward(self, x: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "B T D"], Float[Tensor, ""]]:
        """The output, and the load-balance loss `E sum_e (share of choices) (mean probability)`, 1 when balanced."""
        probabilities = self.hook_router_logits(self.router(x)).to(x.dtype).softmax(-1)
        indices = self.hook_expert_indices(_largest(probabilities, self.active))
        weights = probabilities.gather(-1, indices)
        weights = self.hook_expert_weights(weights / weights.sum(-1, keepdim=True))
        routed = routed_swiglu(x.flatten(0, 1), indices.flatten(0, 1), weights.flatten(0, 1), self.w_in, self.w_out)
        return self.shared(x) + routed.view_as(x), _balance(probabilities, indices)


def _largest(probabilities: Float[Tensor, "B T E"], k: int) -> Int64[Tensor, "B T k"]:
    """Indices of the k largest, descending. k passes of argmax take less than half the time of `topk` on a CPU for k = 2."""
    chosen = []
    for _ in range(k):
        chosen.append(probabilities.argmax(-1, keepdim=True))
        probabilities = probabilities.scatter(-1, chosen[-1], -1.0)
    return torch.cat(chosen, -1)


def _balance(probabilities: Float[Tensor, "B T E"], indices: Int64[Tensor, "B T k"]) -> Float[Tensor, ""]:
    experts = probabilities.shape[-1]
    chosen = torch.zeros(experts, device=indices.device, dtype=probabilities.dtype)
    chosen = chosen.index_add(0, indices.flatten(), torch.ones_like(indices.flatten(), dtype=probabilities.dtype))
    return experts * (chosen / indices.numel() * probabilities.flatten(0, 1).mean(0)).sum()
