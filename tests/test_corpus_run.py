"""Does a corpus come out the same from one process and from many, and does a stopped run go on?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
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
from engram_interp.models.text import windows
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
    assert (row["low"], row["high"], row["documents"]) == (pytest.approx(expected.low), pytest.approx(expected.high), 14)
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
        assert (out / f"tables/{table}.parquet").read_bytes() == (expected / f"tables/{table}.parquet").read_bytes(), table
    for shard in sorted(file.relative_to(expected) for file in expected.glob("shards/*/*.parquet")):
        assert (out / shard).read_bytes() == (expected / shard).read_bytes(), shard


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


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks of torchrun in /proc")
def test_a_killed_rank_stops_the_run_and_any_number_of_ranks_gives_the_same_bits(corpus, tiny_engram, texts, tmp_path):
    model, many = tmp_path / "model", write_corpus(tmp_path, [f"{i} {text}" for i in range(16) for text in texts])
    save_model(tiny_engram, tiny_engram.tokenizer, model, torch.float32)
    from engram_interp.models.checkpoint import load_model

    expected, out = tmp_path / "expected", tmp_path / "run"
    read_corpus_run(load_model(model), many, expected, CorpusOptions(shard_documents=2, per_token=True))

    started = torchrun(2, model, many, out, shard_documents=2)
    while not list(out.glob("shards/sums/*[13579].parquet")):  # rank 1 reads the odd shards
        assert started.poll() is None, started.communicate()
        time.sleep(0.005)
    os.kill(rank_pid(started.pid, 1), signal.SIGKILL)
    _, errors = started.communicate(timeout=120)
    assert started.returncode != 0
    line = next(line for line in errors.splitlines() if line.startswith("engram-interp: rank 0 of 2"))
    assert "another process is gone" in line
    assert f"shards are finished in {out}, and the same command goes on with them" in line
    assert json.loads((out / "manifest.json").read_text())["status"] == "failed"
    finished = {file: file.stat().st_mtime_ns for file in out.glob("shards/sums/*.parquet")}
    assert 0 < len(finished) < 96

    three = torchrun(3, model, many, out, shard_documents=2)
    _, errors = three.communicate(timeout=120)
    assert three.returncode == 0, errors
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    require_same(out, expected)
    assert open_run(out).manifest.status == "done"

    again = tmp_path / "two"
    two = torchrun(2, model, many, again, shard_documents=2)
    assert two.wait(timeout=120) == 0
    require_same(again, expected)
