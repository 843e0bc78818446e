"""The routed product against its obvious version: values, gradients, and independence of other tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_interp.models.experts import MixtureOfExperts, routed_swiglu, routed_swiglu_reference

ROUTED = torch.ops.engram_interp.routed_swiglu.default


def draw(n: int, experts: int, k: int, seed: int = 0, width: int = 6, hidden: int = 5) -> tuple[torch.Tensor, ...]:
    """Inputs, choices, weights and both matrices, in float64, all but the choices with gradients."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()  # noqa: E731
    indices = torch.rand(n, experts, generator=generator).topk(k).indices
    return normal(n, width), indices, normal(n, k), normal(experts, width, 2 * hidden), normal(experts, hidden, width)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 20), experts=st.integers(1, 9), k=st.integers(1, 4), seed=st.integers(0, 999))
def test_forward_and_gradients_match_the_reference(n: int, experts: int, k: int, seed: int) -> None:
    x, indices, weights, w_in, w_out = draw(n, experts, min(k, experts), seed)
    fast = routed_swiglu(x, indices, weights, w_in, w_out)
    slow = routed_swiglu_reference(x, indices, weights, w_in, w_out)
    torch.testing.assert_close(fast, slow, rtol=1e-11, atol=1e-11)
    upstream = torch.randn(slow.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inputs = (x, weights, w_in, w_out)
    for found, expected in zip(
        torch.autograd.grad(fast, inputs, upstream), torch.autograd.grad(slow, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_gradcheck() -> None:
    x, indices, weights, w_in, w_out = draw(4, 3, 2, width=3, hidden=2)
    assert torch.autograd.gradcheck(lambda *a: routed_swiglu(a[0], indices, *a[1:]), (x, weights, w_in, w_out))


def test_an_expert_without_tokens_gets_zero_gradients() -> None:
    x, indices, weights, w_in, w_out = draw(7, 4, 2)
    indices = torch.tensor([[1, 3]]).expand(7, 2).contiguous()
    out = routed_swiglu(x, indices, weights, w_in, w_out)
    torch.testing.assert_close(out, routed_swiglu_reference(x, indices, weights, w_in, w_out))
    out.sum().backward()
    used = [bool(grad.any()) for grad in w_in.grad]
    assert used == [False, True, False, True]
    assert [bool(grad.any()) for grad in w_out.grad] == used


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_s_bits_do_not_depend_on_the_others(dtype: torch.dtype) -> None:
    x, indices, weights, w_in, w_out = (t.detach() for t in draw(300, 8, 2, width=96, hidden=48))
    x, weights, w_in, w_out = (t.to(dtype) for t in (x, weights, w_in, w_out))
    whole = routed_swiglu(x, indices, weights, w_in, w_out)
    for seed in range(12):
        _, other, *_ = draw(300, 8, 2, seed=50 + seed)
        other = torch.cat([indices[:100], other[100:]])
        assert torch.equal(routed_swiglu(x, other, weights, w_in, w_out)[:100], whole[:100])


def test_the_operator_keeps_torch_s_rules() -> None:
    arguments = draw(5, 3, 2)
    results = torch.library.opcheck(
        ROUTED, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )
    assert set(results.values()) == {"SUCCESS"}


def test_the_layer_is_shared_plus_weighted_top_experts() -> None:
    layer = MixtureOfExperts(width=8, routed=5, active=2, expert_width=4, shared_width=6).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)
    out, balance = layer(x)
    probabilities = (x @ layer.router.weight.T).softmax(-1)
    swiglu = lambda v, w_in, w_out: (torch.nn.functional.silu((v @ w_in).chunk(2)[0]) * (v @ w_in).chunk(2)[1]) @ w_out  # noqa: E731
    chosen = torch.zeros(5, dtype=torch.float64)
    for b in range(2):
        for t in range(3):
            top = sorted(range(5), key=lambda e: -probabilities[b, t, e].item())[:2]
            total = sum(probabilities[b, t, e] for e in top)
            expected = swiglu(x[b, t], layer.shared.w_in.weight.T, layer.shared.w_out.weight.T)
            for e in top:
                chosen[e] += 1
                expected = expected + probabilities[b, t, e] / total * swiglu(x[b, t], layer.w_in[e], layer.w_out[e])
            torch.testing.assert_close(out[b, t], expected)
    torch.testing.assert_close(balance, 5 * (chosen / 12 * probabilities.mean((0, 1))).sum())


def test_balance_is_one_when_balanced_and_more_when_not() -> None:
    layer = MixtureOfExperts(width=4, routed=4, active=1, expert_width=2, shared_width=2)
    with torch.no_grad():
        layer.w_in.zero_()
        layer.w_out.zero_()
        layer.router.weight.copy_(50 * torch.eye(4))
    assert layer(torch.eye(4).unsqueeze(0))[1].item() == pytest.approx(1.0)
    assert layer(torch.eye(4)[:1].expand(1, 4, 4))[1].item() == pytest.approx(4.0)
