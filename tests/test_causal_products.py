"""Causal attention as blocked products: value and gradients against the obvious version, causality, speed's one excuse."""

from __future__ import annotations

import pytest
import torch

from engram_interp.models import causal_products
from engram_interp.models.attention import Attention
from engram_interp.models.causal_products import causal_attention, causal_attention_reference


def draw(length: int, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(3, 2, length, 8, generator=generator)).to(dtype).requires_grad_() for _ in range(4)]


@pytest.mark.parametrize("length", [1, 5, 64, 65, 150])
def test_value_and_gradients_match_the_reference(length: int) -> None:
    *inputs, grad = draw(length)
    found, expected = causal_attention(*inputs), causal_attention_reference(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_block_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    *inputs, _ = draw(40)
    whole = causal_attention(*inputs)
    monkeypatch.setattr(causal_products, "_BLOCK", 7)
    torch.testing.assert_close(causal_attention(*inputs), whole, rtol=1e-12, atol=1e-12)


def test_bfloat16_is_as_close_as_its_rounding() -> None:
    *inputs, grad = draw(70, dtype=torch.bfloat16)
    exact = [part.detach().double().requires_grad_() for part in inputs]
    expected = causal_attention_reference(*exact)
    found = causal_attention(*inputs)
    assert found.dtype is torch.bfloat16
    assert ((found.double() - expected).norm() / expected.norm()).item() < 0.01  # scores near 20 are rounded by 0.06
    for a, b in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True
    ):
        assert (a.double() - b).norm() / b.norm() < 0.02


def test_the_attention_layer_takes_it_only_where_products_are_rounded() -> None:
    layer = Attention(16, 2, 32, 10_000.0)
    x = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(1))
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(x)
    assert rounded.dtype is torch.bfloat16
    assert 0 < (rounded.float() - exact).abs().max() < 0.02
    changed = torch.cat([x[:, :20], x[:, 20:] + 1], 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(changed)[:, :20], rounded[:, :20]), "no look into the future"
