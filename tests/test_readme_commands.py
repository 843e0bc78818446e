"""Does every command of the README's "Your own model" run as it is printed, on directories of the formats it names?

The lines are taken from the README, the folders they name are made of small random tensors below a temporary working
directory. Misleads: a layout that a release has and these folders lack is not seen here.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer

import engram_interp.cli
from engram_interp import app_launcher
from engram_interp.gallery import load_gallery
from engram_interp.models.checkpoint import save_model
from engram_interp.studies import report
from tests.conftest import random_model
from tests.foreign_checkpoints import SHAPES, qwen_host, write_checkpoint

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
SECTION = README[README.index("\n## Your own model") : README.index("\n## Models of others")]
COMMANDS = re.findall(r"^\$ engram-interp (.*?)(?: +#.*)?$", SECTION, flags=re.MULTILINE)
SAYS = {
    "check path/to/Qwen": "causality",
    "gates path/to/Qwen": "block 1 · branch 3",
    "memory lookup path/to/Qwen": "the |  Gre | at",
    "memory lookup path/to/DeepSeek": "the | gre | at",
    "memory rows path/to/DeepSeek": "not_finite",
    "gates path/to/DeepSeek": "block 1 · branch 3",
    "report": "report: runs/mine/report.html",
    "app": "",
}


@pytest.fixture(scope="module")
def folder(tiny_engram, tiny_moe, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which every path of the section lies."""
    top = tmp_path_factory.mktemp("own")
    qwen, deepseek = (top / "path/to" / name for name in ("Qwen3.8-Flash-Next", "DeepSeek-V4.1-Flash"))
    qwen_host(tokenizer.get_vocab_size()).save_pretrained(qwen)
    (qwen / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    deepseek.mkdir()
    shape = SHAPES["toy"]
    write_checkpoint(deepseek, shape, tokenizer)
    ids = np.array([tokenizer.encode("Diana, Princess of Wales").ids])
    rng = np.random.default_rng(0)
    hidden = {
        f"L{block}.hidden_in": rng.normal(size=(*ids.shape, shape["hc_mult"], shape["width"])).astype(np.float32)
        for block in shape["layer_ids"]
    }
    np.savez(top / "hidden.npz", input_ids=ids, **hidden)
    control = random_model(tokenizer, "tiny-control", routed_experts=12, memory=False, seed=21)
    for name, model in (("RUN_A", tiny_engram), ("RUN_B", tiny_moe), ("RUN_C", control)):
        save_model(model, model.tokenizer, top / name)
    return top


def test_all_of_the_section_is_tried():
    assert len(COMMANDS) == len(SAYS) == SECTION.count("\n$ ")
    assert all(command.startswith(start) for command, start in zip(COMMANDS, SAYS, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_runs_as_printed(command: str, folder: Path, monkeypatch, capsys):
    whole = load_gallery()
    few = tuple(s for i, s in enumerate(whole) if i % 10 == 0 or s.category == "figure-7")
    monkeypatch.setattr(report, "load_gallery", lambda: few)
    monkeypatch.setattr(app_launcher, "subprocess", SimpleNamespace(Popen=_Server))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["engram-interp", *shlex.split(command)])
    with pytest.raises(SystemExit) as stop:
        engram_interp.cli.main()
    said, complained = capsys.readouterr()
    assert stop.value.code == 0, complained
    assert next(part for start, part in SAYS.items() if command.startswith(start)) in said
    if command.startswith("app"):
        after = _Server.command[_Server.command.index("--") + 1 :]
        assert after == ["--model", str(folder / "RUN_A"), "--model", str(folder / "RUN_B")]


class _Server:
    """Stands in for the server process; the tests of the dashboard start the real one."""

    command: list[str] = []

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        type(self).command = command

    def wait(self) -> int:
        return 0
