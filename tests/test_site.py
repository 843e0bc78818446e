"""The record of a memory site: complete, the same for every kind of model, and sharing the model's tensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from engram_interp.models.house import HouseModel
from engram_interp.models.site import HashConstants, sites_of


def test_the_house_model_has_one_record_per_memory(tiny_engram: HouseModel) -> None:
    sites = sites_of(tiny_engram)
    assert [site.block for site in sites] == [1, 3]
    for site in sites:
        engram = tiny_engram.engram(site.block)
        assert site.engram is engram
        assert (site.orders, site.heads, site.branches, site.streams) == ((2, 3), 4, 2, 2)
        assert site.used == site.regenerated
        assert site.stored == HashConstants()
        assert site.slots == 8
        assert site.lags(2) == (0, 1)
        assert site.key_gain is engram.key_norm
        assert torch.equal(torch.cat([key.weight for key in site.keys]), engram.key_proj.weight)
        assert site.conv is not None
        assert site.conv.taps is engram.conv
        rows = np.array([0, site.offsets[3], site.rows.rows - 1])
        assert np.array_equal(site.rows.read(rows), engram.table.weight[torch.from_numpy(rows)].numpy())


def test_plain_values_are_json(tiny_engram: HouseModel) -> None:
    plain = json.loads(json.dumps(sites_of(tiny_engram)[0].as_dict()))
    assert plain["multipliers"] == list(tiny_engram.engram(1).ngram_hash.multipliers)
    assert plain["rows"] == sum(sum(row) for row in plain["primes"])
    assert plain["conv"] == {"kernel": 4, "dilation": 3, "eps": 1e-5}


def test_a_model_without_memory_has_no_sites(tiny_moe: HouseModel) -> None:
    assert sites_of(tiny_moe) == ()


def test_anything_else_is_refused() -> None:
    with pytest.raises(ValueError, match="found Path|found PosixPath"):
        sites_of(Path("somewhere"))


def test_offsets_are_the_running_sum() -> None:
    constants = HashConstants.regenerate((1, 3, 5), ((2, 3), (5, 7)))
    assert constants.offsets == (0, 2, 5, 10)
    assert constants.rows == 17
    assert HashConstants.regenerate((1, 3, 5), ((2, 3), (5, 7)), rows=32).rows == 32
