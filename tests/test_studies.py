"""Does every study run from its configuration, go on after a kill to the same bytes, and stand in the list?"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from engram_interp.hooks.overlay import apply_overlay, load_overlay
from engram_interp.models.adapters.opening import open_model
from engram_interp.runs import open_run
from engram_interp.studies.commands import main
from engram_interp.studies.config import load_study_config
from engram_interp.studies.readme import collect_results, render_readme

REPOSITORY = Path(__file__).resolve().parents[1]
EXPERIMENTS = REPOSITORY / "experiments"
SMALL = {"tasks": ["arithmetic"], "items": 4, "fit_texts": 3, "seeds": [0]}
# Studies that train or read other things; test_training_study and test_context_studies run them.
ELSEWHERE = {
    "sweep",
    "allocation",
    "table_size",
    "placement",
    "components",
    "long_context",
    "offload",
    "corpus_scaling",
}
OWN = {
    "remove_engram": {"kinds": ["output_zero", "mean", "resample"]},  # and a baseline: the model itself
    "layer_and_branch": {},
    "order_and_heads": {},
    "dose_response": {"scales": [0.0, 0.5, 1.0]},
    "memory_or_parameters": {},
    "compress_table": {"block": 2, "fractions": [0.25, 0.75], "bits": [8, 2]},
    "edit_fact": {
        "steps": 20,
        "facts": [{"prompt": "The Prince of", "target": " Norfolk", "continuation": " was born in London by the sea."}],
    },
}


def program(name: str):
    return importlib.import_module(f"experiments.{name}")


@pytest.fixture(scope="module")
def checkpoint(tiny_engram, tokenizer, tmp_path_factory) -> Path:
    from engram_interp.models.checkpoint import save_model

    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_model(tiny_engram, tokenizer, path, dtype=torch.float32)
    return path


def write_config(path: Path, checkpoint: Path, name: str, **changes: object) -> Path:
    baseline = {"baseline": str(checkpoint)} if name == "remove_engram" else {}
    path.write_text(yaml.safe_dump({**SMALL, **OWN[name], **baseline, "model": str(checkpoint), **changes}))
    return path


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory) -> Path:
    """A folder with a configuration NAME.yaml and a finished run NAME of two seeds for every study."""
    root = tmp_path_factory.mktemp("studies")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY))
        for name in OWN:
            config = write_config(root / f"{name}.yaml", checkpoint, name)
            assert main(program(name).STUDY, [str(config), "--seeds", "1", "2", "--out", str(root / name)]) == 0
    return root


@pytest.mark.parametrize("name", OWN)
def test_every_study_runs_and_leaves_what_it_declares(name, finished):
    run = open_run(finished / name)
    assert run.manifest.status == "done" and run.manifest.study == name and run.manifest.seeds == [1, 2]
    assert set(run.manifest.tables) == set(program(name).TABLES)
    tables = {table: run.table(table) for table in program(name).TABLES}
    assert all(len(table) for table in tables.values())
    if name != "edit_fact":  # its facts of the configuration go with the first seed
        assert set(tables["items"]["seed"]) == set(tables["effects"]["seed"]) == {1, 2}
        assert np.isfinite(tables["items"]["logprob"]).all()
    assert "plotly" in (finished / name / "figure.html").read_text().lower()
    assert (finished / name / "headline.txt").read_text().strip()
    assert json.loads((finished / name / "speed.json").read_text())["items_per_second"] > 0


@pytest.mark.parametrize("name", OWN)
def test_the_shipped_configurations_are_valid_and_strict(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    kind = program(name).STUDY.config
    shipped = EXPERIMENTS / "configs" / f"{name}.yaml"
    assert load_study_config(kind, shipped).model == "mini-engram"
    (tmp_path / "c.yaml").write_text(shipped.read_text() + "\nitmes: 5\n")
    with pytest.raises(ValueError, match="itmes"):
        load_study_config(kind, tmp_path / "c.yaml")


KILLED_IN_THE_SECOND_PIECE = """
import importlib, os, signal, sys
from engram_interp.runs import atomic, folder
from engram_interp.studies import main
root, names = sys.argv[1], sys.argv[2:]
write, count = folder.RunFolder.write_shard, 0
def write_and_die(self, *arguments):
    global count
    count += 1
    if count == 2:  # with the bytes written and the file not yet in place
        atomic.os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
    write(self, *arguments)
for name in names:
    study = importlib.import_module(f"experiments.{name}").STUDY
    pid = os.fork()
    if pid == 0:
        folder.RunFolder.write_shard = write_and_die
        main(study, [f"{root}/{name}.yaml", "--seeds", "1", "2", "--out", f"{root}/killed/{name}"])
        os._exit(0)
    print(name, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.fixture(scope="module")
def killed(finished) -> dict[str, int]:
    """How each study ended that was killed while it wrote its second piece, in `finished/killed`."""
    (finished / "killed").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", KILLED_IN_THE_SECOND_PIECE, str(finished), *OWN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return {name: int(status) for name, status in map(str.split, done.stdout.splitlines())}


@pytest.mark.parametrize("name", OWN)
def test_a_study_killed_with_sigkill_goes_on_to_the_same_bytes(name, finished, killed, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    assert killed[name] == -signal.SIGKILL
    run, whole = finished / "killed" / name, finished / name
    assert open_run(run).manifest.status == "running"
    assert len(list((run / "shards").glob("*/*.parquet"))) == 1
    arguments = [str(finished / f"{name}.yaml"), "--seeds", "1", "2", "--out", str(run)]
    assert main(program(name).STUDY, arguments) == 0
    assert_same_bytes(run, whole)


def assert_same_bytes(run: Path, whole: Path) -> None:
    manifest = open_run(whole).manifest
    assert (run / "headline.txt").read_bytes() == (whole / "headline.txt").read_bytes()
    for table in manifest.tables:
        file = f"tables/{table}.parquet"
        assert (run / file).read_bytes() == (whole / file).read_bytes(), table
    for name in manifest.tensors:  # safetensors orders a file's metadata anew each time
        first, second = (load_overlay(folder / "tensors" / f"{name}.safetensors") for folder in (run, whole))
        assert first.about == second.about and set(first.edits) == set(second.edits)
        for block, edit in first.edits.items():
            assert torch.equal(edit.rows, second.edits[block].rows)
            assert torch.equal(edit.values, second.edits[block].values)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns of tqdm's idle thread
def test_two_processes_make_the_same_bytes_and_pass_on_an_error(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    study = program("layer_and_branch").STUDY
    arguments = [str(finished / "layer_and_branch.yaml"), "--seeds", "1", "2", "--workers", "2"]
    assert main(study, [*arguments, "--out", str(tmp_path / "two")]) == 0
    assert_same_bytes(tmp_path / "two", finished / "layer_and_branch")

    def fail(self, *arguments: object) -> None:
        raise ValueError("the disk is full")

    monkeypatch.setattr("engram_interp.runs.folder.RunFolder.write_shard", fail)
    assert main(study, [*arguments, "--out", str(tmp_path / "full")]) == 2
    assert capsys.readouterr().err.strip().endswith("error: ValueError: the disk is full")
    assert open_run(tmp_path / "full").manifest.status == "failed"


def test_edits_are_kept_as_overlays_of_the_model(finished, tiny_engram, tokenizer):
    (edit, *others) = open_run(finished / "edit_fact").table("edits").to_dict("records")
    assert [other["method"] for other in others] == ["gradient"]
    overlay = load_overlay(finished / "edit_fact" / "tensors" / "seed1-closed_form-000.safetensors")
    tokens = tiny_engram.to_tokens(edit["prompt"])
    model = open_model(open_run(finished / "edit_fact").manifest.config["model"])
    with apply_overlay(model, overlay):
        logprob = model(tokens)[0, -1].log_softmax(-1)
    assert float(logprob[tokenizer.encode(edit["target"]).ids[0]]) == pytest.approx(edit["logprob_after"], abs=1e-4)


def test_families_stand_beside_the_published_numbers_and_the_baseline(finished):
    run = open_run(finished / "remove_engram")
    published = run.table("published").set_index("benchmark")
    assert published.loc["PIQA", "retained_above_chance"] == pytest.approx(0.41, abs=0.005)
    assert published.loc["MMLU", "retained_above_chance"] == pytest.approx(0.57, abs=0.005)
    assert published.loc["TriviaQA", "retained_above_chance"] == published.loc["TriviaQA", "retained"] == 0.29
    rows = run.table("families").query("seed == 1 and family == 'arithmetic'")
    assert (rows["published_retained_low"] == 0.36).all() and (rows["published_retained_high"] == 0.67).all()
    assert (rows["baseline_score"] == rows["score_full"]).all()  # here the baseline is the model itself
    task = run.table("effects").query("seed == 1 and condition == 'output_zero'").iloc[0]
    family = rows.query("condition == 'output_zero'").iloc[0]
    assert family["change_logprob"] == pytest.approx(task["change_logprob"])


def test_errors_are_one_line(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    study = program("remove_engram").STUDY
    cases = {
        "kinds": write_config(tmp_path / "a.yaml", checkpoint, "remove_engram", kinds=["nothing"]),
        "give the data folder": write_config(tmp_path / "b.yaml", checkpoint, "remove_engram", tasks=["lre"]),
        "no such file": tmp_path / "missing.yaml",
        "expected a model directory": write_config(tmp_path / "d.yaml", Path("nowhere"), "remove_engram"),
        "threads: 1 with workers": write_config(tmp_path / "e.yaml", checkpoint, "remove_engram", threads=2, workers=2),
    }
    for message, config in cases.items():
        assert main(study, [str(config), "--out", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and (message in error or "unknown kind" in error)


def test_the_list_of_studies_is_up_to_date():
    assert (EXPERIMENTS / "README.md").read_text(encoding="utf-8") == render_readme(EXPERIMENTS)
    assert {p.stem for p in EXPERIMENTS.glob("*.py") if not p.name.startswith("_")} == set(OWN) | ELSEWHERE


def test_finished_runs_are_taken_into_the_list(finished, tmp_path):
    shutil.copytree(EXPERIMENTS, tmp_path / "experiments", ignore=shutil.ignore_patterns("results", "__pycache__"))
    assert "Not run yet." in render_readme(tmp_path / "experiments")
    (finished / "dose_response_2").mkdir(exist_ok=True)  # a folder that is no run of that name
    assert set(collect_results(finished, tmp_path / "experiments" / "results")) == set(OWN)
    text = render_readme(tmp_path / "experiments")
    assert text.count("Not run yet.") == len(ELSEWHERE)
    for name in OWN:
        assert (finished / name / "headline.txt").read_text().strip() in text
    assert all(digest[:12] in text for digest in open_run(finished / "edit_fact").manifest.models.values())
    assert str(finished) not in text


def test_the_ablate_command_prints_and_writes(checkpoint, tmp_path, capsys):
    from engram_interp.studies.commands import run_ablate

    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({**SMALL, "conditions": [{"kind": "gate_scale", "options": {"scale": 0.5}}]}))
    assert run_ablate(str(checkpoint), config, as_json=True) == 0
    assert '"gate_scale scale=0.5"' in capsys.readouterr().out
    assert run_ablate(str(checkpoint), config, out=tmp_path / "e.csv") == 0
    assert len((tmp_path / "e.csv").read_text().splitlines()) == 2
    study = write_config(tmp_path / "study.yaml", checkpoint, "remove_engram", kinds=["output_zero"])
    assert run_ablate(str(checkpoint), study, out=tmp_path / "s.csv") == 0
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 1 + 3  # jointly and in each of two blocks
    with pytest.raises(ValueError, match="ending in"):
        run_ablate(str(checkpoint), config, out=tmp_path / "e.txt")
