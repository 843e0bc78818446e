"""The studies of long contexts and of tables outside memory, at small size."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from engram_interp.models.checkpoint import save_model
from engram_interp.runs import open_run
from engram_interp.studies.commands import main

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def checkpoints(tiny_engram, tiny_moe, tokenizer, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("engram", tiny_engram), ("moe", tiny_moe)):
        save_model(model, tokenizer, folder / name, dtype=torch.float32)
    return {name: str(folder / name) for name in ("engram", "moe")}


def run(name: str, settings: dict, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    (folder / "c.yaml").write_text(yaml.safe_dump(settings))
    module = importlib.import_module(f"experiments.{name}")
    assert main(module.STUDY, [str(folder / "c.yaml"), "--out", str(folder / "run")]) == 0
    opened = open_run(folder / "run")
    assert set(module.TABLES) <= set(opened.manifest.tables)
    return module, opened


def test_long_context_compares_and_says_when_it_cannot(checkpoints, tmp_path, capsys, monkeypatch):
    engram, moe = checkpoints["engram"], checkpoints["moe"]
    settings = {"model": engram, "baseline": moe, "control": moe, "lengths": [110, 260], "items": 12}
    _, opened = run("long_context", settings, tmp_path, monkeypatch)
    scores, gaps = opened.table("scores"), opened.table("differences")
    assert len(scores) == 3 * 2 * 2
    assert (scores["chance"] == 0.25).all()
    assert len(opened.manifest.models) == 2
    assert (gaps[["null", "null_low", "null_high"]].to_numpy() == 0).all(), "a model against itself"
    assert gaps["verdict"].str.startswith("not estimable").all(), "random models are at chance"
    assert scores["stretched"].max() > scores["stretched"].min()
    assert "not estimable" in capsys.readouterr().out


@pytest.mark.slow
def test_offload_measures_every_condition(checkpoints, tmp_path, monkeypatch):
    settings = {
        "model": checkpoints["engram"], "rows": 500, "batch": 1, "steps": 3, "rounds": 2, "cache_fractions": [0.05, 0.9],
    }  # fmt: skip
    module, opened = run("offload", settings, tmp_path, monkeypatch)
    passes = opened.table("passes")
    assert set(passes["condition"]) == set(module.CONDITIONS)
    assert (passes["tokens_per_second"] > 0).all()
    ahead = passes["condition"].str.startswith("ahead")
    assert (passes.loc[ahead, "prefetched"] == 1).all()
    assert (passes.loc[~ahead, "prefetched"] == 0).all()
    cache = opened.table("cache").sort_values("cache_fraction")["hit_rate"].to_numpy()
    assert 0 <= cache[0] < cache[1] < 1


def test_hit_rate_counts_the_last_used(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    hit_rate = importlib.import_module("experiments.offload").hit_rate
    assert hit_rate(np.array([1, 2, 1, 3, 2, 1]), 2) == pytest.approx(1 / 6)
    assert hit_rate(np.array([1, 2, 1, 3, 2, 1]), 3) == pytest.approx(3 / 6)
