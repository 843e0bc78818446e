"""Do the divergences in float32 agree with float64, stay non-negative, and refuse what is not finite?"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_interp.measure.divergence import (
    cross_entropy,
    entropy,
    expm1_minus,
    jensen_shannon,
    kl_divergence,
    reference_entropy,
    reference_js,
    reference_kl,
    reverse_kl,
    small_kl,
    top1_agreement,
)


def draw(seed: int, n: int, v: int, scale: float, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    final = torch.randn(n, v, generator=generator) * scale
    return final, final + torch.randn(n, v, generator=generator) * noise


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    v=st.integers(2, 3000),
    scale=st.sampled_from([0.1, 1.0, 8.0, 30.0]),
    noise=st.sampled_from([0.0, 1e-6, 1e-4, 1e-2, 1.0, 10.0]),
)
def test_float32_agrees_with_float64(seed: int, v: int, scale: float, noise: float):
    final, layer = draw(seed, 5, v, scale, noise)
    p, q = final.double().numpy(), layer.double().numpy()
    np.testing.assert_allclose(kl_divergence(final, layer), reference_kl(p, q), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(reverse_kl(final, layer), reference_kl(q, p), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(jensen_shannon(final, layer), reference_js(p, q), atol=1e-5)
    np.testing.assert_allclose(entropy(layer), reference_entropy(q), atol=1e-5)
    assert kl_divergence(final, layer).min() >= -1e-6
    assert 0 <= jensen_shannon(final, layer).min() <= jensen_shannon(final, layer).max() <= math.log(2)


def test_float64_input_is_computed_in_float64():
    final, layer = draw(1, 20, 500, 5.0, 1.0)
    expected = reference_kl(final.double().numpy(), layer.double().numpy())
    np.testing.assert_allclose(kl_divergence(final.double(), layer.double()), expected, atol=1e-12)


def test_equal_logits_give_exactly_zero():
    final, _ = draw(2, 50, 4000, 20.0, 0.0)
    assert (kl_divergence(final, final.clone()) == 0).all()
    assert (small_kl(final, final.clone()) == 0).all()


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3, 3e-4])
def test_small_form_keeps_its_digits(noise: float):
    base, changed = draw(3, 64, 8000, 2.0, noise)
    exact = reference_kl(base.double().numpy(), changed.double().numpy())
    assert exact.max() < 1e-2 * (1 + 99 * (noise > 0.05))
    np.testing.assert_allclose(small_kl(base, changed), exact, rtol=3e-5)
    assert (small_kl(base, changed) >= 0).all()


@pytest.mark.parametrize("x", [-0.5, -0.0999, 1e-3, 0.0999, 0.1001])
def test_expm1_minus_meets_its_series_on_both_sides_of_the_switch(x: float):
    found = expm1_minus(torch.tensor([x], dtype=torch.float64)).item()
    assert found == pytest.approx(math.fsum(x**k / math.factorial(k) for k in range(2, 30)), rel=1e-6)


def test_small_form_survives_overflow():
    base, changed = torch.zeros(1, 3), torch.tensor([[0.0, 500.0, 0.0]])
    expected = reference_kl(base.double().numpy(), changed.double().numpy())
    np.testing.assert_allclose(small_kl(base, changed), expected, rtol=1e-6)


def test_kl_of_far_apart_distributions_needs_no_epsilon():
    final, layer = torch.tensor([[0.0, 200.0]]), torch.tensor([[200.0, 0.0]])
    assert kl_divergence(final, layer).item() == pytest.approx(200.0, abs=1e-4)
    assert jensen_shannon(final, layer).item() == pytest.approx(math.log(2), abs=1e-6)


def test_cross_entropy_and_agreement():
    final, layer = draw(4, 30, 100, 3.0, 3.0)
    targets = torch.randint(0, 100, (30,), generator=torch.Generator().manual_seed(5))
    expected = torch.nn.functional.cross_entropy(final.double(), targets, reduction="none")
    np.testing.assert_allclose(cross_entropy(final, targets), expected, atol=1e-5)
    agreed = top1_agreement(final, layer)
    assert agreed.tolist() == [int(a.argmax()) == int(b.argmax()) for a, b in zip(final, layer, strict=True)]
    assert 0 < agreed.sum() < 30
    with pytest.raises(ValueError, match=r"targets in \[0, 100\)"):
        cross_entropy(final, targets + 100)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("function", [kl_divergence, reverse_kl, jensen_shannon, top1_agreement, small_kl])
def test_not_finite_is_refused_by_token(function, bad: float):
    final, layer = draw(6, 5, 10, 1.0, 1.0)
    layer[3, 7] = bad
    with pytest.raises(ValueError, match="token 3"):
        function(final, layer)


def test_bfloat16_logits_are_upcast():
    final, layer = draw(7, 10, 300, 2.0, 0.5)
    low = [x.bfloat16() for x in (final, layer)]
    np.testing.assert_allclose(kl_divergence(*low), reference_kl(*(x.double().numpy() for x in low)), atol=1e-5)
