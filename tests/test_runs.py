"""Does a run folder survive being killed, and is a broken one always listed with its reason?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from engram_interp.runs import RunError, list_runs, open_run, start_run
from engram_interp.runs.commands import run_list, run_show, run_table

ARGUMENTS = {"study": "count", "config": {"n": 3}, "seeds": [0], "models": {"m": "abc"}, "texts_sha256": "def"}


def make_run(path: Path) -> None:
    with start_run(path, **ARGUMENTS) as run:
        run.write_shard("rows", "a", pd.DataFrame({"x": [1, 2]}))
        run.write_shard("rows", "b", pd.DataFrame({"x": [3]}))
        run.gather("rows", ["a", "b"])
        run.write_tensors("weights", {"w": torch.arange(3.0)})


def test_a_finished_run_reads_back(tmp_path):
    make_run(tmp_path / "one")
    run = open_run(tmp_path / "one")
    assert run.manifest.status == "done" and run.manifest.finished >= run.manifest.started
    assert run.manifest.tables == {"rows": 3} and run.manifest.tensors == ["weights"]
    assert run.table("rows")["x"].tolist() == [1, 2, 3]
    with pytest.raises(RunError, match="no table 'other'; tables: rows"):
        run.table("other")


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), "cancelled"), (ZeroDivisionError("no"), "failed"), (None, "done")]
)
def test_the_manifest_says_how_a_run_ended(tmp_path, error, status):
    with pytest.raises(type(error)) if error else nullcontext(), start_run(tmp_path / "r", **ARGUMENTS) as run:
        assert json.loads((run.path / "manifest.json").read_text())["status"] == "running"
        if error:
            raise error
    assert open_run(tmp_path / "r").manifest.status == status


def test_another_configuration_in_the_same_folder_is_refused(tmp_path):
    make_run(tmp_path / "r")
    with (
        pytest.raises(
            RunError, match=rf"another config.*delete it \(rm -r {tmp_path}/r\), or .* another folder with --out"
        ),
        start_run(tmp_path / "r", **{**ARGUMENTS, "config": {"n": 4}}),
    ):
        pass
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(RunError, match="not a run folder"), start_run(tmp_path / "notes", **ARGUMENTS):
        pass


def test_a_run_can_be_given_more_seeds_but_no_others(tmp_path):
    make_run(tmp_path / "r")
    with start_run(tmp_path / "r", **ARGUMENTS | {"seeds": [0, 1]}):
        pass
    assert open_run(tmp_path / "r").manifest.seeds == [0, 1]
    for seeds in ([0], [1, 0], [2]):
        with (
            pytest.raises(RunError, match="another seeds"),
            start_run(tmp_path / "r", **ARGUMENTS | {"seeds": seeds}),
        ):
            pass


def test_a_run_of_other_software_is_not_continued(tmp_path):
    make_run(tmp_path / "r")
    edit(
        tmp_path / "r",
        versions={**json.loads((tmp_path / "r" / "manifest.json").read_text())["versions"], "torch": "1"},
    )
    with pytest.raises(RunError, match="another versions"), start_run(tmp_path / "r", **ARGUMENTS):
        pass


def test_a_damaged_piece_is_named(tmp_path):
    make_run(tmp_path / "r")
    cut(tmp_path / "r" / "shards" / "rows" / "b.parquet")
    with pytest.raises(RunError, match=r"b\.parquet: damaged"), start_run(tmp_path / "r", **ARGUMENTS) as run:
        run.gather("rows", ["a", "b"])


def test_a_folder_that_cannot_be_read_is_listed_as_broken(tmp_path, monkeypatch):
    make_run(tmp_path / "good")
    (tmp_path / "locked").mkdir()
    exists = Path.exists
    refuse = lambda self: _refused() if "locked" in self.parts else exists(self)  # noqa: E731
    monkeypatch.setattr(Path, "exists", refuse)
    assert [(run.name, run.status) for run in list_runs(tmp_path)] == [("good", "done"), ("locked", "broken")]


def _refused() -> bool:
    raise PermissionError("no")


def test_names_cannot_leave_the_folder(tmp_path):
    with pytest.raises(RunError, match="expected a name"), start_run(tmp_path / "r", **ARGUMENTS) as run:
        run.write_table("../../x", pd.DataFrame({"x": [1]}))


def test_gather_names_a_missing_piece(tmp_path):
    with (
        pytest.raises(RunError, match="lacks 1 pieces, the first is 'c'"),
        start_run(tmp_path / "r", **ARGUMENTS) as run,
    ):
        run.write_shard("rows", "a", pd.DataFrame({"x": [1]}))
        run.gather("rows", ["a", "c"])


DAMAGE = {
    "no manifest": (lambda run: (run / "manifest.json").unlink(), "manifest.json is missing"),
    "half a manifest": (
        lambda run: (run / "manifest.json").write_text('{"schema_version": 1, "stu'),
        "not readable as JSON",
    ),
    "an unknown key": (lambda run: edit(run, extra=1), "extra"),
    "a future version": (lambda run: edit(run, schema_version=9), "expected schema version 1, found 9"),
    "a wrong type": (lambda run: edit(run, seeds="0"), "seeds"),
    "a truncated table": (lambda run: cut(run / "tables" / "rows.parquet"), "damaged"),
    "a missing table": (lambda run: (run / "tables" / "rows.parquet").unlink(), "missing"),
    "rows that do not match": (lambda run: edit(run, tables={"rows": 7}), "says 7 rows, the file holds 3"),
    "a truncated tensor file": (lambda run: cut(run / "tensors" / "weights.safetensors"), "damaged"),
    "binary rubbish": (lambda run: (run / "manifest.json").write_bytes(b"\xff\xfe\x00"), "not readable"),
    "a list": (lambda run: (run / "manifest.json").write_text("[]"), "expected schema version"),
}


def edit(run: Path, **changes: object) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | changes))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:20])


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_folder_is_listed_as_broken_with_the_reason(tmp_path, damage, capsys):
    act, reason = DAMAGE[damage]
    make_run(tmp_path / "good")
    make_run(tmp_path / "bad")
    act(tmp_path / "bad")
    bad, good = list_runs(tmp_path)
    assert good.status == "done"
    assert bad.status == "broken" and reason in bad.reason
    assert run_list(tmp_path) == 0
    assert "broken" in capsys.readouterr().out
    with pytest.raises(RunError):
        open_run(tmp_path / "bad")


def test_commands_print_and_export(tmp_path, capsys):
    make_run(tmp_path / "one")
    assert run_list(tmp_path, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)[0]["status"] == "done"
    assert run_show(tmp_path / "one", as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["study"] == "count"
    assert run_table(tmp_path / "one", "rows", as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == [{"x": 1}, {"x": 2}, {"x": 3}]
    assert run_table(tmp_path / "one", "rows", out=tmp_path / "rows.csv") == 0
    assert pd.read_csv(tmp_path / "rows.csv")["x"].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="ending in"):
        run_table(tmp_path / "one", "rows", out=tmp_path / "rows.xls")


SLOW_RUN = """
import sys, time
from pathlib import Path
import numpy as np, pandas as pd
from engram_interp.runs import start_run
arguments = dict(study="slow", config={}, seeds=[0], models={}, texts_sha256="")
with start_run(Path(sys.argv[1]), **arguments) as run:
    for shard in map(str, range(6)):
        if shard not in run.done_shards("rows"):
            values = np.random.default_rng(int(shard)).normal(size=1000)
            run.write_shard("rows", shard, pd.DataFrame({"x": values}))
            time.sleep(float(sys.argv[2]))
    run.gather("rows", list(map(str, range(6))))
"""


def test_killed_and_started_again_gives_the_same_bytes(tmp_path):
    command = [sys.executable, "-c", SLOW_RUN]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    process = subprocess.Popen([*command, str(tmp_path / "killed"), "30"], env=environment)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("killed/shards/rows/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert open_run(tmp_path / "killed").manifest.status == "running"
    assert len(list(tmp_path.glob("killed/shards/rows/*.parquet"))) == 1
    for name in ("killed", "whole"):
        subprocess.run([*command, str(tmp_path / name), "0"], env=environment, check=True)
    killed, whole = ((tmp_path / name / "tables" / "rows.parquet").read_bytes() for name in ("killed", "whole"))
    assert killed == whole
    assert np.isfinite(open_run(tmp_path / "killed").table("rows")["x"]).all()


def test_the_documentation_names_every_key_of_the_manifest():
    from engram_interp.runs.manifest import SCHEMA_VERSION, Manifest

    text = (Path(__file__).resolve().parents[1] / "docs/run_folder.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in row.replace("`", "").replace(" ", "").split(",")} == set(
        Manifest.model_fields
    )
    assert f"## The manifest, schema {SCHEMA_VERSION}" in text
