"""Do the parts of a write sum to the write, and the components to the logits?"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from engram_interp.probes.attribution import (
    AttributionError,
    direct_logit_attribution,
    memory_attribution,
    value_split,
)

TEXT = "Diana, Princess of Wales, was born in Norfolk."


@pytest.fixture(scope="module")
def found(tiny_engram):
    return memory_attribution(tiny_engram, TEXT)


@pytest.fixture
def double(request, tiny_engram):
    return copy.deepcopy(tiny_engram).double() if request.param else None


@pytest.mark.parametrize(("double", "tolerance"), [(False, 1e-4), (True, 1e-10)], indirect=["double"])
def test_components_sum_to_the_logits(tiny_engram, double, tolerance: float):
    model = double or tiny_engram
    result = direct_logit_attribution(model, TEXT)
    tokens = model.to_tokens(TEXT)
    logits = model(tokens)[0]
    assert np.abs(result.contributions.sum(0) - result.logit).max() == result.residue <= tolerance
    assert result.targets[:-1].tolist() == tokens[0, 1:].tolist()
    assert result.targets[-1] == int(logits[-1].argmax())
    for position, target in enumerate(result.targets):
        assert result.logit[position] == logits[position, target].item()


@pytest.mark.parametrize(("double", "tolerance"), [(False, 1e-4), (True, 1e-10)], indirect=["double"])
def test_parts_of_the_write_sum_to_its_component(tiny_engram, double, tolerance: float):
    result = memory_attribution(double or tiny_engram, TEXT)
    for e, layer in enumerate(result.layers):
        component = result.direct.contributions[result.direct.components.index(f"{layer}_engram_out")]
        parts = result.slot_logits[e].sum(-1) + result.bias_logits[e] + result.conv_logits[e]
        np.testing.assert_allclose(parts, component, atol=tolerance)
        np.testing.assert_allclose(result.value_share[e].sum(-1) + result.bias_share[e], 1, atol=1e-5)
        assert np.abs(result.slot_logits[e]).max() > 1e-3
        assert np.abs(result.conv_logits[e]).max() > 1e-3


def test_value_split_sums_to_the_value(tiny_engram):
    tokens = tiny_engram.to_tokens(TEXT)
    _, cache = tiny_engram.run_with_cache(tokens, "*.engram.hook_*")
    engram = tiny_engram.engram(1)
    split = value_split(engram, cache["blocks.1.engram.hook_embedding"])
    assert split.shape[2] == 8
    torch.testing.assert_close(split.sum(2), cache["blocks.1.engram.hook_value"], atol=1e-5, rtol=1e-5)


def test_a_slot_is_what_zeroing_its_columns_removes(tiny_engram):
    model = copy.deepcopy(tiny_engram).double()
    tokens = model.to_tokens(TEXT)
    _, cache = model.run_with_cache(tokens, "blocks.1.engram.hook_*")
    engram, embedding = model.engram(1), cache["blocks.1.engram.hook_embedding"]
    without = embedding.clone()
    without[..., 3 * 4 : 4 * 4] = 0  # slot 3 of width 4
    removed = engram.value_proj(embedding) - engram.value_proj(without)
    torch.testing.assert_close(value_split(engram, embedding)[:, :, 3], removed, atol=1e-12, rtol=0)


def test_bias_is_kept_apart(tiny_engram):
    model = copy.deepcopy(tiny_engram)
    for layer in model.engram_layers:
        projection = model.engram(layer).value_proj
        bias = torch.randn(projection.out_features, generator=torch.Generator().manual_seed(layer))
        projection.bias = torch.nn.Parameter(bias, requires_grad=False)
    result = memory_attribution(model, TEXT)
    assert np.abs(result.bias_logits).max() > 1e-3
    parts = result.slot_logits.sum(-1) + result.bias_logits + result.conv_logits
    components = [result.direct.contributions[result.direct.components.index(f"{i}_engram_out")] for i in result.layers]
    np.testing.assert_allclose(parts, np.stack(components), atol=1e-4)
    assert result.direct.residue <= 1e-4


def test_difference_of_two_tokens(tiny_engram, found):
    length = len(found.direct.tokens)
    other = [(7 * i) % tiny_engram.vocab_size for i in range(length)]
    result = direct_logit_attribution(tiny_engram, TEXT, against=other)
    alone = direct_logit_attribution(tiny_engram, TEXT, targets=other)
    np.testing.assert_allclose(result.contributions, found.direct.contributions - alone.contributions, atol=1e-4)
    assert result.residue <= 1e-4
    with pytest.raises(AttributionError, match=f"expected {length} targets"):
        direct_logit_attribution(tiny_engram, TEXT, targets=[1, 2])


def test_forms(found):
    assert found.orders == (2, 3)
    assert found.order_logits.shape == (2, len(found.direct.tokens), 2)
    np.testing.assert_allclose(found.order_logits.sum(-1), found.slot_logits.sum(-1), atol=1e-5)
    names, rows = found.parts()
    assert len(names) == len(rows) == 2 * (8 + 2)
    table = found.table()
    row = table[(table.part == "block 3 3-gram head 1") & (table.position == 4)]
    assert row.contribution.item() == pytest.approx(found.slot_logits[1, 4, 5])
    heatmap = found.figure().data[0]
    assert heatmap.zmin == -heatmap.zmax
    assert set(found.direct.table().part) == set(found.direct.components)


def test_baseline_has_components_but_no_memory(tiny_moe):
    assert direct_logit_attribution(tiny_moe, TEXT).residue <= 1e-4
    with pytest.raises(AttributionError, match="expected a model with memory"):
        memory_attribution(tiny_moe, TEXT)
