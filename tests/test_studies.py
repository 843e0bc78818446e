"""Does every study run from its configuration, go on after a kill to the same bytes, and stand in the list?"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from engram_interp.runs import open_run
from engram_interp.studies.commands import main
from engram_interp.studies.config import load_study_config
from engram_interp.studies.readme import render_readme

REPOSITORY = Path(__file__).resolve().parents[1]
EXPERIMENTS = REPOSITORY / "experiments"
SMALL = {"tasks": ["arithmetic"], "items": 4, "fit_texts": 3, "seeds": [0]}
OWN = {
    "remove_engram": {"kinds": ["output_zero", "mean", "resample"]},
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
    path.write_text(yaml.safe_dump({**SMALL, **OWN[name], "model": str(checkpoint), **changes}))
    return path


@pytest.mark.parametrize("name", OWN)
def test_every_study_runs_and_leaves_what_it_declares(name, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    config = write_config(tmp_path / "c.yaml", checkpoint, name)
    assert main(program(name).STUDY, [str(config), "--out", str(tmp_path / "run")]) == 0
    run = open_run(tmp_path / "run")
    assert run.manifest.status == "done" and run.manifest.study == name
    assert set(run.manifest.tables) == set(program(name).TABLES)
    assert all(len(run.table(table)) for table in program(name).TABLES)
    assert "plotly" in (tmp_path / "run" / "figure.html").read_text().lower()
    assert "run folder" in capsys.readouterr().out


@pytest.mark.parametrize("name", OWN)
def test_the_shipped_configurations_are_valid_and_strict(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    kind = program(name).STUDY.config
    shipped = EXPERIMENTS / "configs" / f"{name}.yaml"
    assert load_study_config(kind, shipped).model == "mini-engram"
    (tmp_path / "c.yaml").write_text(shipped.read_text() + "\nitmes: 5\n")
    with pytest.raises(ValueError, match="itmes"):
        load_study_config(kind, tmp_path / "c.yaml")


KILLED_AFTER_ONE = """
import os, signal, sys
from engram_interp.runs.folder import RunFolder
write = RunFolder.write_shard
def write_and_die(self, *arguments):
    write(self, *arguments)
    os.kill(os.getpid(), signal.SIGKILL)
RunFolder.write_shard = write_and_die
from engram_interp.studies import main
from experiments.remove_engram import STUDY
main(STUDY, sys.argv[1:])
"""


def test_a_study_killed_with_sigkill_goes_on_to_the_same_bytes(checkpoint, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    config = write_config(tmp_path / "c.yaml", checkpoint, "remove_engram")
    arguments = lambda name: [str(config), "--seeds", "1", "2", "--out", str(tmp_path / name)]  # noqa: E731
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    killed = subprocess.run([sys.executable, "-c", KILLED_AFTER_ONE, *arguments("killed")], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert open_run(tmp_path / "killed").manifest.status == "running"
    assert len(list((tmp_path / "killed" / "shards" / "items").glob("*.parquet"))) == 1
    for name in ("killed", "whole"):
        assert main(program("remove_engram").STUDY, arguments(name)) == 0
    for table in open_run(tmp_path / "whole").manifest.tables:
        first, second = ((tmp_path / n / "tables" / f"{table}.parquet").read_bytes() for n in ("killed", "whole"))
        assert first == second, table
    items = open_run(tmp_path / "whole").table("items")
    assert set(items["seed"]) == {1, 2} and np.isfinite(items["logprob"]).all()


def test_errors_are_one_line(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    study = program("remove_engram").STUDY
    cases = {
        "kinds": write_config(tmp_path / "a.yaml", checkpoint, "remove_engram", kinds=["nothing"]),
        "give the data folder": write_config(tmp_path / "b.yaml", checkpoint, "remove_engram", tasks=["lre"]),
        "no such file": tmp_path / "missing.yaml",
        "unknown model": write_config(tmp_path / "d.yaml", Path("nowhere"), "remove_engram"),
    }
    for message, config in cases.items():
        assert main(study, [str(config), "--out", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and (message in error or "unknown kind" in error)


def test_the_list_of_studies_is_up_to_date():
    assert (EXPERIMENTS / "README.md").read_text(encoding="utf-8") == render_readme(EXPERIMENTS)
    assert {p.stem for p in EXPERIMENTS.glob("*.py") if not p.name.startswith("_")} == set(OWN)


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
