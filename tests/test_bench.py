"""Does the bench time what it says, keep it, and go on after a stop?"""

from __future__ import annotations

import json
import time

import pandas as pd
import pytest
import torch

from engram_interp.runs.folder import open_run
from engram_interp.studies import bench as module
from engram_interp.studies.bench import bench, bench_groups, run_bench
from engram_interp.studies.bench_candidates import (
    _products,
    _stacked,
    _without_hook_points,
    bench_model,
    cka_candidates,
    forward_candidates,
    ngram_candidates,
    vocabulary_candidates,
)


def test_ratios_are_to_the_first_candidate_of_the_same_round():
    result = bench("g", {"unit": lambda: time.sleep(0.01), "double": lambda: time.sleep(0.02)}, rounds=3, threads=2)
    table = result.table().set_index("candidate")
    assert table.loc["unit", "ratio"] == 1
    assert 1.5 < table.loc["double", "ratio_q25"] <= table.loc["double", "ratio"] <= table.loc["double", "ratio_q75"]
    assert len(result.seconds["double"]) == 3
    with pytest.raises(ValueError, match="at least one round, found 0"):
        bench("g", {}, rounds=0)


def test_candidates_compute_what_their_names_say(tiny_engram):
    generator = torch.Generator().manual_seed(0)
    found = forward_candidates(tiny_engram, generator, batch=2)
    with torch.no_grad():
        values = {name.split(" (")[0]: run() for name, run in found.items()}
    assert values["without any hook point"].equal(values["plain forward"])
    stacked = values["lens: logits of all sites stacked"]
    torch.testing.assert_close(values["lens: KL, exact"].kl, stacked, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(values["lens: all quantities"].kl, stacked, atol=1e-4, rtol=1e-4)
    fast = values["lens: KL, fast"]
    assert (fast.kl - stacked).abs().max() < max(5 * fast.error, 1e-4)


def test_the_bench_model_is_the_one_the_ratios_are_quoted_for():
    model = bench_model(torch.Generator().manual_seed(0))
    assert (model.layers, model.width, model.vocab_size, model.engram_layers) == (12, 256, 8192, (1, 6))


def test_a_copy_without_hook_points_shares_the_weights(tiny_engram):
    bare = _without_hook_points(tiny_engram)
    assert bare.embed.weight is tiny_engram.embed.weight
    assert not [m for m in bare.modules() if type(m).__name__ == "HookPoint"]


def test_other_groups_run_at_small_sizes():
    generator = torch.Generator().manual_seed(1)
    vocabulary = vocabulary_candidates(generator, vocab_size=700, sites=3, tokens=20, width=16)
    found = vocabulary["KL, exact"]()
    torch.testing.assert_close(found.kl, vocabulary["logits of all sites stacked"](), atol=1e-5, rtol=0)
    ngram = ngram_candidates(generator, rows_per_head=300, head_width=4, vocab_size=500, tokens=30)
    assert ngram["reader"]().equal(ngram["plain torch"]().flatten(-2))
    assert cka_candidates(generator, rows=60, layers=2, width=5)["grid of all pairs"]().n == 60
    assert _products(torch.zeros(2, 3, 4), torch.zeros(5, 4)) is None
    assert _stacked(torch.zeros(2, 3, 4), torch.zeros(5, 4)).abs().max() == 0


def test_a_run_is_kept_and_continued(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        module,
        "bench_groups",
        lambda groups, model, seed: {g: lambda g=g: {g: lambda: calls.append(g)} for g in groups},
    )
    run_bench(["cka", "ngram"], None, tmp_path / "r", rounds=2, threads=[1])
    assert calls == ["cka"] * 3 + ["ngram"] * 3
    (tmp_path / "r" / "shards" / "ratios" / "1.threads-1.parquet").unlink()
    run_bench(["cka", "ngram"], None, tmp_path / "r", rounds=2, threads=[1])
    assert calls[6:] == ["ngram"] * 3
    opened = open_run(tmp_path / "r")
    assert list(opened.table("ratios").candidate) == ["cka", "ngram"]
    assert opened.table("seconds").groupby("candidate").size().to_dict() == {"cka": 2, "ngram": 2}
    assert opened.manifest.status == "done"


def test_unknown_group_and_names():
    with pytest.raises(ValueError, match="unknown group 'lens': expected some of forward, vocabulary"):
        bench_groups(["lens"], None)
    assert list(bench_groups(["ngram", "cka"], None)) == ["ngram, bundled table", "ngram, 27B table", "cka"]


def test_command_prints_the_run(tmp_path, monkeypatch, capsys):
    from engram_interp import cli

    rows = pd.DataFrame([{"group": "cka", "candidate": "grid", "ratio": 1.25}])
    monkeypatch.setattr(module, "run_bench", lambda *a, **k: rows)
    assert cli.bench(group=("cka",), out=tmp_path / "r", json=True) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == [{"group": "cka", "candidate": "grid", "ratio": 1.25}]
