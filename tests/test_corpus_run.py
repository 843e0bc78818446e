"""Does a corpus come out the same from one process and from many, and does a stopped run go on?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import zstandard

from engram_interp.corpus import run as run_module
from engram_interp.corpus.documents import stream_documents
from engram_interp.corpus.processes import Processes
from engram_interp.corpus.reading import CorpusReader
from engram_interp.corpus.run import CorpusOptions, read_corpus_run
from engram_interp.corpus.sums import Quantity, Sums
from engram_interp.measure.statistics import group_mean_interval, mean_interval
from engram_interp.models.checkpoint import save_model
from engram_interp.probes.gates import read_gates
from engram_interp.probes.lens import logit_lens_kl
from engram_interp.runs.folder import open_run
from engram_interp.runs.manifest import RunError
from engram_interp.training.corpus import CorpusError, write_token_file

TABLES = ("summary", "histogram", "documents")


def write_corpus(folder: Path, texts: list[str]) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"title": str(i), "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, texts) -> Path:
    """Fourteen documents, one longer than the context of 64."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), [*texts, " ".join(texts), "The sea."])


@pytest.fixture(scope="module")
def one_process(corpus, tiny_engram, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    read_corpus_run(tiny_engram, corpus, out, CorpusOptions(shard_documents=3, per_token=True))
    return out


def test_values_are_those_of_the_probes(tiny_engram, one_process, texts):
    tokens = pd.read_parquet(one_process / "shards" / "tokens")
    every = [*texts, " ".join(texts), "The sea."]
    lens = logit_lens_kl(tiny_engram, every, quantities="kl")
    assert np.array_equal(tokens["document"], lens.document)
    assert np.array_equal(tokens["token_id"], lens.token_ids)
    for site in range(lens.sites):
        assert np.allclose(tokens[f"kl_{site}"], lens.kl[site], atol=1e-5)
        assert np.allclose(tokens[f"cross_entropy_{site}"], lens.cross_entropy[site], atol=1e-4, equal_nan=True)
        assert np.array_equal(tokens[f"agreement_{site}"], lens.agreement[site])
    for number in (0, 12):  # one window, and many
        gates = read_gates(tiny_engram, every[number])
        mine = tokens[tokens["document"] == number]
        for e, block in enumerate((1, 3)):
            for branch in range(2):
                assert np.allclose(mine[f"gate_{block}_{branch}"], gates.gates[1:, e, branch], atol=1e-6)


def test_the_tables_sum_up_the_tokens(one_process):
    run = open_run(one_process)
    tokens = pd.read_parquet(one_process / "shards" / "tokens")
    documents, summary = run.table("documents"), run.table("summary").set_index(["kind", "layer", "branch"])
    by_document = tokens.groupby("document")
    assert np.allclose(documents["kl_2"], by_document["kl_2"].mean(), rtol=1e-6)
    assert list(documents["tokens"]) == list(by_document.size())
    row = summary.loc[("gate", 3, 1)]
    assert row["mean"] == pytest.approx(tokens["gate_3_1"].mean(), rel=1e-6)
    assert row["sd"] == pytest.approx(tokens["gate_3_1"].std(ddof=0), rel=1e-5)
    assert row["q25"] == pytest.approx(np.quantile(tokens["gate_3_1"], 0.25), abs=0.02)
    expected = mean_interval(tokens["kl_1"].to_numpy(np.float64), tokens["document"].to_numpy())
    row = summary.loc[("kl", 1, -1)]
    assert (row["low"], row["high"], row["documents"]) == (
        pytest.approx(expected.low),
        pytest.approx(expected.high),
        14,
    )
    assert summary.loc[("kl", 4, -1), "mean"] == 0
    counted = run.table("histogram").groupby(["kind", "layer", "branch"])["tokens"].sum()
    assert counted.loc[("kl", 2, -1)] == len(tokens) == counted.loc[("cross_entropy", 2, -1)] + 14


@pytest.mark.parametrize("form", ["bin", "jsonl.zst"])
def test_every_form_of_a_corpus_gives_the_same_documents(form, corpus, tokenizer, tmp_path):
    path = tmp_path / f"corpus.{form}"
    if form == "bin":
        write_token_file(path, [corpus], tokenizer)
    else:
        path.write_bytes(zstandard.compress(corpus.read_bytes()))
    expected, found = (dict(stream_documents(p, tokenizer, lambda n: n != 4)) for p in (corpus, path))
    assert list(found) == list(expected) == list(range(14))
    assert found.pop(4) is expected.pop(4) is None
    assert all(np.array_equal(found[n], expected[n]) for n in expected)


def test_a_document_may_cross_the_blocks_of_a_token_file(corpus, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "corpus.bin"
    write_token_file(path, [corpus], tokenizer)
    expected = dict(stream_documents(path, tokenizer))
    for block in (1, 7):
        monkeypatch.setattr("engram_interp.corpus.documents._BLOCK", block)
        found = dict(stream_documents(path, tokenizer))
        assert all(np.array_equal(found[n], expected[n]) for n in expected)
        assert len(found) == 14


def test_sums_and_intervals_of_groups():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(6), [3, 9, 1, 4, 20, 7])
    values = rng.normal(size=len(groups)) + groups
    means = np.array([values[groups == g].mean() for g in range(6)])
    expected, found = mean_interval(values, groups), group_mean_interval(means, np.bincount(groups))
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))
    with pytest.raises(ValueError, match="at least 2 groups"):
        group_mean_interval(means[:1], np.array([3]))
    quantities = (Quantity("gate", 1, 0), Quantity("kl", 2))
    many = np.stack([rng.random(5000), rng.lognormal(-3, 2, 5000)]).astype(np.float32)
    sums = Sums.of(quantities, many)
    assert np.array_equal(Sums.of_frame(sums.frame()).values, sums.values)
    for p in (0.05, 0.5, 0.95):
        assert sums.quantile(quantities[0], p) == pytest.approx(np.quantile(many[0], p), abs=0.01)
        assert sums.quantile(quantities[1], p) == pytest.approx(np.quantile(many[1], p), rel=0.3)
    outside = Sums.of(quantities, np.array([[0.0, 1.0], [0.0, 1e9]], dtype=np.float32))
    assert outside.values[:, 3].tolist() == outside.values[:, -1].tolist() == [1, 1]


def test_what_cannot_be_read_is_refused(corpus, tiny_engram, tiny_moe, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="'tiny-moe' has no memory"):
        CorpusReader(tiny_moe, ("gates",), 8, torch.device("cpu"))
    with pytest.raises(ValueError, match="expected some of gates, lens to read, found none"):
        CorpusReader(tiny_engram, (), 8, torch.device("cpu"))
    with pytest.raises(ValueError, match="expected batch of at least 1, found 0"):
        CorpusOptions(batch=0)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(ValueError, match="at least one document, found none"):
        read_corpus_run(tiny_engram, empty, tmp_path / "run", CorpusOptions())
    path = tmp_path / "corpus.bin"
    write_token_file(path, [corpus], tokenizer)
    header = Path(f"{path}.json")
    header.write_text(header.read_text().replace('"tokenizer_sha256": "', '"tokenizer_sha256": "0'))
    with pytest.raises(CorpusError, match="made by another tokenizer"):
        list(stream_documents(path, tokenizer))


def test_empty_documents_are_counted_and_gates_can_be_left_out(tiny_engram, texts, tmp_path):
    path = write_corpus(tmp_path, ["", texts[0], "", texts[1], ""])
    read_corpus_run(tiny_engram, path, tmp_path / "run", CorpusOptions(("lens",), shard_documents=2, per_token=True))
    table = open_run(tmp_path / "run").table("documents")
    assert list(table["tokens"] > 0) == [False, True, False, True, False]
    assert list(table["kl_0"].notna()) == [False, True, False, True, False]
    assert not [column for column in table if column.startswith("gate")]
    some = read_corpus_run(tiny_engram, path, tmp_path / "two", CorpusOptions(("gates",), documents=2, batch=1))
    assert some.summary["documents"].tolist() == [1] * 4
    assert set(some.summary["kind"]) == {"gate"}


def test_a_stopped_run_goes_on_and_refuses_others(corpus, tiny_engram, tiny_moe, one_process, tmp_path, monkeypatch):
    out, options = tmp_path / "run", CorpusOptions(shard_documents=3, per_token=True)
    real = run_module._read_shard

    def stop_at_the_third(reader, run, name, *rest):
        if name == "00000002":
            raise KeyboardInterrupt
        real(reader, run, name, *rest)

    monkeypatch.setattr(run_module, "_read_shard", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        read_corpus_run(tiny_engram, corpus, out, options)
    monkeypatch.setattr(run_module, "_read_shard", real)
    before = {file: file.stat().st_mtime_ns for file in out.glob("shards/*/*.parquet")}
    assert len(before) == 6
    for model, other in ((tiny_engram, CorpusOptions(shard_documents=4)), (tiny_moe, CorpusOptions(("lens",)))):
        with pytest.raises(RunError, match=r"another (config|models)"):
            read_corpus_run(model, corpus, out, other)
    with pytest.raises(RunError, match="another texts_sha256"):
        read_corpus_run(tiny_engram, write_corpus(tmp_path, ["Other words."]), out, options)
    result = read_corpus_run(tiny_engram, corpus, out, options)
    assert (result.read, result.shards) == (3, 5)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    require_same(out, one_process)


def require_same(out: Path, expected: Path) -> None:
    for table in TABLES:
        assert (out / f"tables/{table}.parquet").read_bytes() == (expected / f"tables/{table}.parquet").read_bytes(), (
            table
        )
    for shard in sorted(file.relative_to(expected) for file in expected.glob("shards/*/*.parquet")):
        assert (out / shard).read_bytes() == (expected / shard).read_bytes(), shard


class Meeting(Processes):
    """Ranks that are threads: the same sums without a network."""

    def sum_rows(self, rows):
        SHARED[self.rank] = rows
        BARRIER.wait(timeout=60)
        total = sum(SHARED[rank] for rank in range(self.size))
        BARRIER.wait(timeout=60)
        return total


SHARED: dict[int, torch.Tensor] = {}
BARRIER = threading.Barrier(1)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_any_number_of_ranks_gives_the_same_bits(size, corpus, tiny_engram, one_process, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "BARRIER", threading.Barrier(size))
    monkeypatch.setattr(run_module, "_BLOCK", 2)
    options = CorpusOptions(shard_documents=3, per_token=True)

    def rank(number: int):
        return read_corpus_run(tiny_engram, corpus, tmp_path / "run", options, Meeting(number, size))

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(rank, range(size)))
    assert [r.read for r in results] == [len(range(n, 5, size)) for n in range(size)]
    require_same(tmp_path / "run", one_process)


def torchrun(ranks: int, model: Path, corpus: Path, out: Path, **options: object) -> subprocess.Popen:
    """The command a user types, with torchrun's own rendezvous on a free port."""
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    flags = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command += ["engram_interp", "corpus", str(model), "--texts", str(corpus), "--out", str(out), "--per-token", *flags]
    return subprocess.Popen(
        command, env=environment, cwd=out.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def rank_pid(parent: int, rank: int) -> int | None:
    """The process that torchrun started as a rank."""
    for entry in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        try:
            if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{entry}/environ").read_bytes():
                return int(entry)
        except OSError:
            continue
    return None


@pytest.mark.slow
@pytest.mark.timeout(900)  # five processes that import torch, on a machine that may be busy
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks of torchrun in /proc")
def test_a_killed_rank_stops_the_run_and_any_number_of_ranks_gives_the_same_bits(corpus, tiny_engram, texts, tmp_path):
    model, many = tmp_path / "model", write_corpus(tmp_path, [f"{i} {text}" for i in range(8) for text in texts])
    save_model(tiny_engram, tiny_engram.tokenizer, model, torch.float32)
    from engram_interp.models.checkpoint import load_model

    expected, out = tmp_path / "expected", tmp_path / "run"
    read_corpus_run(load_model(model), many, expected, CorpusOptions(shard_documents=2, per_token=True))

    started = torchrun(3, model, many, out, shard_documents=2)
    while not list(out.glob("shards/sums/*.parquet")):
        assert started.poll() is None, started.communicate()
        time.sleep(0.005)
    os.kill(rank_pid(started.pid, 1), signal.SIGKILL)
    _, errors = started.communicate()
    assert started.returncode != 0
    line = next(line for line in errors.splitlines() if line.startswith("engram-interp: rank 0 of 3"))
    assert "another process is gone" in line
    assert f"shards are finished in {out}, and the same command goes on with them" in line
    assert json.loads((out / "manifest.json").read_text())["status"] == "failed"
    finished = {file: file.stat().st_mtime_ns for file in out.glob("shards/sums/*.parquet")}
    assert 0 < len(finished) < 48

    again = torchrun(2, model, many, out, shard_documents=2)
    _, errors = again.communicate()
    assert again.returncode == 0, errors
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    require_same(out, expected)
    assert open_run(out).manifest.status == "done"


def test_the_study_measures_every_size_and_compares_within_rounds(corpus, tiny_engram, tokenizer, tmp_path):
    from engram_interp.studies import Context
    from experiments import corpus_scaling

    save_model(tiny_engram, tokenizer, tmp_path / "model", torch.float32)
    write_token_file(tmp_path / "corpus.bin", [corpus], tokenizer)
    config = corpus_scaling.Config(
        model=str(tmp_path / "model"), corpus=tmp_path / "corpus.bin", documents=(2, 14), rounds=1
    )
    plan = corpus_scaling.plan(Context(config, tiny_engram))
    assert [shard.name for shard in plan.shards] == ["round-0-documents-2", "round-0-documents-14"]
    row = plan.shards[1].make()["costs"].iloc[0]
    expected = sum(len(ids) for _, ids in stream_documents(tmp_path / "corpus.bin", tokenizer))
    assert row["tokens"] == expected
    assert row["cpu_seconds"] > 0
    assert row["peak_bytes"] > 2**27, "torch alone holds more than that"
    costs = pd.DataFrame(
        {"round": [0, 0, 1, 1], "documents": [1, 9, 1, 9], "tokens": [10, 90, 10, 90], "cpu_seconds": [1, 9, 2, 27],
         "peak_bytes": [2**20, 2**21, 2**22, 2**21]}
    )  # fmt: skip
    found = corpus_scaling.report(Context(config, tiny_engram), {"costs": costs})
    ratios = found.tables["ratios"].loc[1, ["ratio", "lowest", "highest", "peak_mb"]].tolist()
    assert ratios == pytest.approx([1.25, 1.0, 1.5, 2.0])
    assert found.headline[1].startswith("90 tokens: CPU time per token 1.25 [1.00, 1.50]")


def test_the_command_says_what_it_did(corpus, tmp_path, capsys, monkeypatch):
    from engram_interp.cli import main

    words = ["corpus", "mini-moe", "--texts", str(corpus), "--documents", "2", "--out", str(tmp_path / "run")]
    for extra, text in (([], "1 of 1 shards read now"), (["--json"], '"kind": "kl"')):
        monkeypatch.setattr(sys, "argv", ["engram-interp", *words, *extra])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 0
        assert text in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["engram-interp", *words, "--read", "gates"])
    with pytest.raises(SystemExit):
        main()
    assert "'mini-moe' has no memory to look at" in capsys.readouterr().err
