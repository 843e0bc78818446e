"""Needles and variables: the right value is where it should be, and longer contexts keep what was known."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from engram_interp.models.extension import extend_context
from engram_interp.models.registry import load
from engram_interp.probes.task_long import needle_items, variable_items


@pytest.fixture(scope="module")
def words():
    return load("mini-engram").tokenizer


@pytest.mark.parametrize("length", [80, 200])
def test_needles_name_their_value_once_and_fit(words, length):
    items = needle_items(words, 8, np.random.default_rng(0), length=length)
    assert len(items) == 8
    assert len({item.group for item in items}) == 2
    for item in items:
        assert len(words.encode(item.prompt).ids) <= length + 1
        key = re.search(r"The sign of (\w+) is$", item.prompt)[1]
        assert f"The sign of {key} is{item.choices[0]}." in item.prompt
        for wrong in item.choices[1:]:
            assert f"is{wrong}." in item.prompt
            assert f"The sign of {key} is{wrong}." not in item.prompt
    longer = needle_items(words, 4, np.random.default_rng(0), length=2 * length)
    assert len(longer[0].prompt) > 1.4 * len(items[0].prompt)


def test_variables_lead_to_their_value(words):
    for item in variable_items(words, 12, np.random.default_rng(1), length=150):
        name = re.search(r"So (\w+) is$", item.prompt)[1]
        for _ in range(3):
            name = re.search(rf"Let {name} be (\w+)\.", item.prompt)[1]
        assert item.choices[0] == f" {name}"
        assert len(item.choices) == 4


def test_what_does_not_fit_is_refused(words):
    with pytest.raises(ValueError, match="expected a length of at least"):
        variable_items(words, 4, np.random.default_rng(1), length=20)


def test_a_longer_context_keeps_the_fastest_frequency(tiny_engram):
    tokens = torch.randint(3, tiny_engram.vocab_size, (1, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(extend_context(tiny_engram, 1)(tokens), tiny_engram(tokens))
    longer = extend_context(tiny_engram, 3)
    assert longer.context == 3 * tiny_engram.context
    rotary, before = longer.blocks[0].attn.rotary, tiny_engram.blocks[0].attn.rotary
    length = before.shape[1]
    torch.testing.assert_close(rotary[:, :length, 0], before[..., 0])
    angle = torch.atan2(rotary[1, 1, -1], rotary[0, 1, -1]) / torch.atan2(before[1, 1, -1], before[0, 1, -1])
    assert float(angle) == pytest.approx(1 / 3, rel=1e-3)
    long = torch.randint(
        3, tiny_engram.vocab_size, (1, 2 * tiny_engram.context), generator=torch.Generator().manual_seed(0)
    )
    assert torch.isfinite(longer(long)).all()
    with pytest.raises(ValueError, match="factor of at least 1"):
        extend_context(tiny_engram, 0)
