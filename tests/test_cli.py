"""The command line as a user meets it: a process, its output, its exit code, one line for what can be mended."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engram_interp.models.checkpoint import save_model

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments, cwd=ROOT):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-m", "engram_interp", *map(str, arguments)],
        capture_output=True, text=True, env=environment, cwd=cwd, timeout=240, check=False,
    )  # fmt: skip


def assert_one_line(result, *parts):
    assert result.returncode == 2, result.stdout + result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("engram-interp: ")
    for part in parts:
        assert part in lines[0]


@pytest.fixture(scope="module")
def saved(tiny_engram, tiny_moe, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    for name, model in (("engram", tiny_engram), ("moe", tiny_moe)):
        save_model(model, model.tokenizer, directory / name)
    return directory


def test_gates_prints_the_record_as_json_and_writes_a_page(saved, tmp_path):
    page = tmp_path / "gates.html"
    result = run("gates", saved / "engram", "--text", "Alexander the Great was a king.", "--json", "--out", page)
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    tokens, layers, branches = len(record["tokens"]), 2, 2
    assert record["layers"] == [1, 3]
    for key, depth in (("gates", 3), ("scores", 3), ("write_norm", 2)):
        assert len(record[key]) == tokens
        assert len(record[key][0]) == layers
        if depth == 3:
            assert len(record[key][0][0]) == branches
    assert record["provenance"]["models"]["tiny-engram"]
    assert page.read_text().count("<span") >= 4 * tokens
    assert page.read_text().startswith("<!doctype html>")


def test_gates_shows_a_strip_per_layer_and_branch(saved):
    result = run("gates", saved / "engram", "--text", "The old castle.")
    assert result.returncode == 0, result.stderr
    for label in ("block 1 · branch 0", "block 1 · branch 1", "block 3 · branch 0", "block 3 · branch 1"):
        assert label in result.stdout
    assert result.stdout.count("castle") == 4


def test_what_a_user_can_mend_is_one_line(saved, tmp_path):
    assert_one_line(run("gates", saved / "engram", "--text", ""), "empty text")
    assert_one_line(run("gates", "mini-engine", "--text", "x"), "mini-engram", "mini-moe", "mini-moe-control")
    assert_one_line(run("gates", saved / "moe", "--text", "x"), "no memory")
    assert_one_line(run("gates", saved / "engram", "--text", "word " * 9000), "8192")
    (tmp_path / "empty.txt").write_text("\n \n")
    assert_one_line(run("lens", saved / "engram", saved / "moe", "--texts", tmp_path / "empty.txt"), "empty file")
    (tmp_path / "bad.yaml").write_text("tokens: 5\nlearning_speed: 1\n")
    assert_one_line(run("train", tmp_path / "bad.yaml"), "bad.yaml", "learning_speed")


def test_lens_compares_two_models_as_json(saved, texts, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    result = run("lens", saved / "engram", saved / "moe", "--texts", tmp_path / "texts.txt", "--json")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["layers"] == [0, 1, 2, 3, 4]
    assert record["documents"] == len(texts)
    for name in ("tiny-engram", "tiny-moe"):
        assert record["kl"][name]["mean"][-1] == 0
        assert len(record["kl"][name]["low"]) == 5
    gap = record["kl"]["tiny-engram"]["mean"][2] - record["kl"]["tiny-moe"]["mean"][2]
    assert record["difference"]["mean"][2] == pytest.approx(gap, abs=1e-6)


def test_cka_compares_two_models_as_json(saved, tmp_path):
    result = run("cka", saved / "engram", saved / "moe", "--control", saved / "moe", "--soft-alignment", "3", "--json")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert len(record["cka"]) == 5
    assert len(record["cka"][0]) == 5
    assert record["soft_alignment"]["k"] == 3
    assert len(record["soft_alignment"]["null"]) == 5
    assert record["n"] > 300


def test_help_answers_without_loading_torch():
    probe = (
        "import sys; sys.argv = ['engram-interp', '--help']\n"
        "import engram_interp.cli as cli\n"
        "try:\n    cli.main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print('LOADED', sorted({'torch', 'transformers', 'plotly', 'streamlit', 'pandas'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip().endswith("LOADED []")
    for command in ("gates", "lens", "cka", "ablate", "memory", "check", "train", "demo"):
        assert command in result.stdout


def test_a_closed_pipe_is_no_error(saved):
    command = f"{sys.executable} -m engram_interp --help | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.stderr == ""
