"""Does the bench time what it says, keep it, and go on after a stop?"""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from engram_interp.cli import studying
from engram_interp.runs.folder import open_run
from engram_interp.studies import bench as module
from engram_interp.studies.bench import bench, bench_groups, run_bench
from engram_interp.studies.bench_candidates import (
    Candidate,
    _products,
    _without_hook_points,
    bench_model,
    cka_candidates,
    forward_candidates,
    ngram_candidates,
    stacked_kl,
    vocabulary_candidates,
)
from engram_interp.studies.bench_peers import _peer, cka_peer_candidates, llama, peer_candidates


def test_ratios_are_to_the_first_candidate_of_the_same_round(monkeypatch):
    monkeypatch.setattr(module, "_SHORT", 0.0)  # no more rounds than asked for
    candidates = [
        Candidate("unit", lambda: time.sleep(0.01)),
        Candidate("double", lambda: SimpleNamespace(error=1e-6, slept=time.sleep(0.02)), 1.5),
        Candidate("six", lambda: time.sleep(0.01), times=6),
        Candidate("absent", None, note="not installed"),
    ]
    lines = []
    result = bench("g", candidates, rounds=3, threads=2, report=lines.append)
    table = result.table().set_index("candidate")
    assert table.loc["unit", "ratio"] == 1
    assert 1.5 < table.loc["double", "ratio_q25"] <= table.loc["double", "ratio"] <= table.loc["double", "ratio_q75"]
    assert 4 < table.loc["six", "ratio"] < 9
    assert (table.loc["double", "target"], table.loc["double", "error"]) == (1.5, 1e-6)
    assert table.loc["absent", "note"] == "not installed"
    assert table.loc[["unit", "absent"], ["target", "error"]].isna().all(axis=None)
    assert len(result.seconds["double"]) == 3
    assert "absent" not in result.seconds
    assert [line.split(": ")[1].split(",")[0] for line in lines] == ["unit", "double", "six", *table.index]
    with pytest.raises(ValueError, match="at least one round, found 0"):
        bench("g", [], rounds=0)


def test_short_groups_get_more_rounds(monkeypatch):
    monkeypatch.setattr(module, "_SHORT", 3600.0)
    assert len(bench("g", [Candidate("unit", lambda: None)], rounds=2).seconds["unit"]) == 40


def test_the_order_changes_from_round_to_round_and_repeats_with_the_seed(monkeypatch):
    monkeypatch.setattr(module, "_SHORT", 0.0)

    def order(seed: int) -> list[str]:
        calls = []
        bench("g", [Candidate(n, lambda n=n: calls.append(n)) for n in "abcd"], rounds=6, seed=seed)
        return ["".join(calls[i : i + 4]) for i in range(0, 28, 4)]

    first = order(1)
    assert first[0] == "abcd"
    assert all(sorted(round_) == list("abcd") for round_ in first)
    assert len(set(first)) > 3
    assert order(1) == first != order(2)


def test_candidates_compute_what_their_names_say(tiny_engram):
    generator = torch.Generator().manual_seed(0)
    found = forward_candidates(tiny_engram, generator, batch=2)
    with torch.no_grad():
        values = {c.name.split(" (")[0]: c.run() for c in found}
    assert values["forward without any hook point"].equal(values["forward, hook points idle"])
    stacked = values["lens: logits of all sites stacked"]
    torch.testing.assert_close(values["lens: KL, exact"].kl, stacked, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(values["lens: all quantities"].kl, stacked, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(values["lens: TransformerLens recipe"], stacked, atol=1e-4, rtol=1e-4)
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
    stacked, exact, _, *products = vocabulary_candidates(generator, vocab_size=700, sites=3, tokens=20, width=16)
    torch.testing.assert_close(exact.run().kl, stacked.run(), atol=1e-5, rtol=0)
    assert [product.run() for product in products] == [None, None]
    plain, library, again = ngram_candidates(generator, rows_per_head=300, head_width=4, vocab_size=500, tokens=30)
    assert library.run().equal(plain.run())
    assert again.run().equal(plain.run())
    assert cka_candidates(generator, rows=60, layers=2, width=5)[1].run().n == 60
    assert _products(torch.zeros(2, 3, 4), torch.zeros(5, 4)) is None
    assert stacked_kl(torch.zeros(2, 3, 4), torch.zeros(5, 4)).abs().max() == 0


def test_every_line_the_project_must_show_has_a_target():
    generator = torch.Generator().manual_seed(1)
    vocabulary = vocabulary_candidates(generator, vocab_size=70, sites=2, tokens=2, width=4)
    cka = cka_candidates(generator, rows=8, layers=1, width=2)
    ngram = ngram_candidates(generator, rows_per_head=30, head_width=2, vocab_size=50, tokens=3)
    assert [c.target for c in vocabulary + cka + ngram] == [None, 0.4, 1 / 9, None, None, None, 1.3, None, 0.5, 0.5]


def test_peers_are_timed_where_they_are_installed_and_named_where_not(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    model = llama(generator, layers=2, width=16, vocab_size=90)
    found = {c.name: c for c in peer_candidates(generator, model)}
    with torch.no_grad():
        stacked = found["logits of all sites stacked"].run()
        torch.testing.assert_close(found["this library: KL, exact"].run().kl, stacked, atol=1e-5, rtol=0)
    for name, package in (("tuned-lens: LogitLens", "tuned_lens"),):
        if find_spec(package) is None:
            assert found[name].note == f"{package} is not installed"
    broken = _peer("json", "json", lambda: lambda: 1 / 0)
    assert broken.run is None
    assert broken.note == "does not run: ZeroDivisionError: division by zero"
    assert _peer("json", "json", lambda: lambda: 1).run() == 1
    *_, grid = cka_peer_candidates(generator, rows=16, layers=2, width=3)
    assert grid.run().values.shape == (2, 2)


def test_a_run_is_kept_and_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SHORT", 0.0)
    calls = []
    monkeypatch.setattr(
        module,
        "bench_groups",
        lambda groups, model, seed: {g: lambda g=g: [Candidate(g, lambda: calls.append(g))] for g in groups},
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
    assert list(bench_groups(["peers"], None)) == ["peers", "cka peers"]


def test_command_prints_the_run(tmp_path, monkeypatch, capsys):
    rows = pd.DataFrame([{"group": "cka", "candidate": "grid", "ratio": 1.25}])
    monkeypatch.setattr(module, "run_bench", lambda *a, **k: rows)
    assert studying.bench(group=("cka",), out=tmp_path / "r", json=True) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == [{"group": "cka", "candidate": "grid", "ratio": 1.25}]
