"""Training: the loss, the order, the schedule, the optimiser's groups, and a killed run that ends as any other."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from engram_interp.models.checkpoint import load_model
from engram_interp.models.house import HouseModel
from engram_interp.training.config import ConfigError, TrainConfig, load_train_config, parse_config
from engram_interp.training.corpus import BOS_ID, CorpusError
from engram_interp.training.loss import cross_entropy, cross_entropy_reference
from engram_interp.training.train import TokenRows, Trainer, held_out_loss, learning_rate, make_optimiser, row_order

STEPS = 24


@pytest.fixture
def run(training_run: TrainConfig) -> TrainConfig:
    assert training_run.steps == STEPS
    return training_run


def into(config: TrainConfig, out: Path, **changes: object) -> TrainConfig:
    return config.model_copy(update={"out": out} | changes)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# -- the loss --------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(n=st.sampled_from([1, 5, 255, 256, 257, 600]), vocab=st.integers(2, 40), seed=st.integers(0, 99))
def test_chunked_loss_matches_the_reference(n: int, vocab: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = (4 * torch.randn(n, 7, generator=generator)).double().requires_grad_()
    unembedding = (4 * torch.randn(vocab, 7, generator=generator)).double().requires_grad_()
    targets = torch.randint(0, vocab, (n,), generator=generator)
    fast, slow = (f(hidden, unembedding, targets) for f in (cross_entropy, cross_entropy_reference))
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    for found, expected in zip(
        torch.autograd.grad(3 * fast, (hidden, unembedding)),
        torch.autograd.grad(3 * slow, (hidden, unembedding)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_large_logits_do_not_overflow() -> None:
    hidden, unembedding = torch.full((2, 1), 1e4), torch.tensor([[1.0], [-1.0], [0.0]])
    assert cross_entropy(hidden, unembedding, torch.tensor([0, 2])).item() == pytest.approx(5e3)


def test_rounded_loss_is_the_loss_of_rounded_operands() -> None:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(300, 16, generator=generator).requires_grad_()
    unembedding = torch.randn(50, 16, generator=generator).requires_grad_()
    targets = torch.randint(0, 50, (300,), generator=generator)
    exact = cross_entropy_reference(hidden.bfloat16().float(), unembedding.bfloat16().float(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = cross_entropy(hidden, unembedding, targets)
    assert rounded.item() == pytest.approx(exact.item(), rel=2e-3)
    for found, expected in zip(
        torch.autograd.grad(rounded, (hidden, unembedding)),
        torch.autograd.grad(exact, (hidden, unembedding)),
        strict=True,
    ):
        assert found.dtype is torch.float32
        assert ((found - expected).norm() / expected.norm()).item() < 0.01


def test_rounded_training_differs_by_rounding_only(run: TrainConfig, tmp_path: Path) -> None:
    exact = Trainer(into(run, tmp_path / "exact"))
    rounded = Trainer(into(run, tmp_path / "rounded", precision="bfloat16"))
    for _ in range(6):
        a, b = exact._train_step(), rounded._train_step()
    assert a["loss"] == pytest.approx(b["loss"], rel=0.02)
    assert a["loss"] != b["loss"]
    assert all(p.dtype is torch.float32 for p in rounded.model.parameters())


# -- what is visited, and how fast -----------------------------------------------------------------------------------


def test_rows_are_bos_and_the_tokens_before_each_target() -> None:
    rows = TokenRows(np.arange(10, 33).astype(np.uint16), 5)
    assert len(rows) == 4
    inputs, targets = rows.rows(np.array([0, 2]))
    assert targets.tolist() == [[10, 11, 12, 13, 14], [20, 21, 22, 23, 24]]
    assert inputs.tolist() == [[BOS_ID, 10, 11, 12, 13], [BOS_ID, 20, 21, 22, 23]]


def test_row_order_depends_on_the_seed_alone() -> None:
    order = row_order(50, 120, seed=4)
    assert np.array_equal(order, row_order(50, 120, seed=4))
    assert not np.array_equal(order, row_order(50, 120, seed=5))
    assert np.array_equal(order[:60], row_order(50, 60, seed=4)), "a longer run starts as a shorter one"
    assert sorted(order[:50]) == sorted(order[50:100]) == list(range(50))
    assert not np.array_equal(order[:50], order[50:100])


def test_the_schedule_warms_up_and_follows_a_cosine(run: TrainConfig) -> None:
    rates = [learning_rate(run, step) for step in range(STEPS + 1)]
    assert rates[:5] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    assert rates[14] == pytest.approx(0.01 * (0.1 + 0.9 * 0.5))
    assert rates[STEPS] == pytest.approx(0.001)
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert rates[9] == pytest.approx(0.01 * (0.1 + 0.45 * (1 + math.cos(math.pi / 4))))


def test_optimiser_groups(run: TrainConfig, fresh_engram: HouseModel) -> None:
    optimiser = make_optimiser(fresh_engram, run)
    names = {parameter: name for name, parameter in fresh_engram.named_parameters()}
    groups = [{names[p] for p in group["params"]} for group in optimiser.param_groups]
    assert sorted(name for group in groups for name in group) == sorted(names.values())
    tables, matrices, rest = optimiser.param_groups
    assert groups[0] == {f"blocks.{i}.engram.table.weight" for i in (1, 3)}
    assert (tables["lr_factor"], tables["weight_decay"]) == (5.0, 0.0)
    assert (matrices["lr_factor"], matrices["weight_decay"]) == (1.0, 0.1)
    assert (rest["lr_factor"], rest["weight_decay"]) == (1.0, 0.0)
    assert {"blocks.1.engram.key_proj.weight", "blocks.0.mlp.w_in", "blocks.0.attn.qkv.weight"} <= groups[1]
    assert {"embed.weight", "blocks.1.engram.conv", "blocks.1.engram.key_norm", "ln_final.w"} <= groups[2]


def test_a_step_moves_the_table_five_times_as_fast(run: TrainConfig, tmp_path: Path) -> None:
    trainer = Trainer(into(run, tmp_path, warmup_steps=0, weight_decay=0.0))
    memory = trainer.model.engram(1)
    assert not memory.conv.any(), "the convolution starts as the identity"
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer._train_step()
    step = lambda name: (dict(trainer.model.named_parameters())[name] - before[name]).abs().max().item()  # noqa: E731
    # Adam's first step is the learning rate times the sign of the gradient
    assert step("blocks.1.engram.table.weight") == pytest.approx(5 * run.learning_rate, rel=1e-3)
    assert step("blocks.1.engram.value_proj.weight") == pytest.approx(run.learning_rate, rel=1e-3)
    assert step("blocks.1.engram.conv") == pytest.approx(run.learning_rate, rel=1e-3)
    unread = (before["blocks.1.engram.table.weight"] == memory.table.weight).all(1)
    assert unread.any(), "rows that no position addressed stay where they were"


# -- a whole run -----------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from engram_interp.training import train
from engram_interp.training.config import TrainConfig

trainer = train.Trainer(TrainConfig.model_validate_json(Path(sys.argv[1]).read_text()))
step = trainer.optimiser.step
def die_in_step_13(*args):
    if trainer.step == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args)
trainer.optimiser.step = die_in_step_13
trainer.run()
"""


@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_had_not_been(run: TrainConfig, tmp_path: Path) -> None:
    straight = into(run, tmp_path / "straight")
    result = Trainer(straight).run()
    assert result.steps == STEPS
    losses = [record["loss"] for record in metrics(straight.out)]
    assert np.mean(losses[-4:]) < losses[0] - 1.0, "training lowers the loss"

    killed = into(run, tmp_path / "killed")
    (tmp_path / "config.json").write_text(killed.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "config.json")],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [record["step"] for record in metrics(killed.out)] == list(range(1, 14))
    assert int(load_file(killed.out / "state.safetensors")["step"]) == 10
    with (killed.out / "metrics.jsonl").open("a") as log:
        log.write('{"step": 14, "lo')  # a kill in the middle of a write
    resumed = Trainer(killed)
    assert resumed.step == 10
    assert resumed.run().steps == STEPS

    state, expected = (load_file(c.out / "state.safetensors") for c in (killed, straight))
    assert state.keys() == expected.keys()
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []
    timeless = [[{k: v for k, v in r.items() if k != "time"} for r in metrics(c.out)] for c in (killed, straight)]
    assert timeless[0] == timeless[1]
    assert [r["step"] for r in timeless[0]] == list(range(1, STEPS + 1))
    assert [r["step"] for r in timeless[0] if "held_out_loss" in r] == [12, 24]
    weights = [(c.out / "model.safetensors").read_bytes() for c in (killed, straight)]
    assert weights[0] == weights[1]

    model = load_model(straight.out)
    model.load_state_dict({n: state[f"weight.{n}"] for n in model.state_dict()})
    trainer = Trainer(straight)  # a finished run has nothing left to do
    assert trainer.run().steps == STEPS
    assert held_out_loss(model, trainer.held_out, 6, 4) == pytest.approx(result.held_out_loss, rel=1e-6)
    inputs, targets = trainer.rows.rows(np.arange(6))
    plain = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    assert result.held_out_loss == pytest.approx(plain.item(), rel=1e-5)


def test_pauses_do_not_change_a_run(run: TrainConfig, tmp_path: Path) -> None:
    straight, paused = into(run, tmp_path / "a"), into(run, tmp_path / "b")
    Trainer(straight).run(limit=6)
    for limit in (0, 1, 3, 2):
        Trainer(paused).run(limit=limit)
    left, right = (load_file(c.out / "state.safetensors") for c in (straight, paused))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert not (paused.out / "model.safetensors").exists(), "an unfinished run is no checkpoint"


def test_seeds_give_different_models_and_equal_seeds_equal_ones(run: TrainConfig, tmp_path: Path) -> None:
    one, same, other = (Trainer(into(run, tmp_path / str(i), seed=seed)) for i, seed in enumerate((3, 3, 4)))
    assert torch.equal(one.model.embed.weight, same.model.embed.weight)
    assert not torch.equal(one.model.embed.weight, other.model.embed.weight)
    assert not np.array_equal(one.order, other.order)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_another_configuration_in_the_directory_is_refused(run: TrainConfig, tmp_path: Path) -> None:
    Trainer(into(run, tmp_path)).run(limit=1)
    before = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"run\.json: this directory holds a run with another configuration"):
        Trainer(into(run, tmp_path, learning_rate=2e-2))
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_a_gradient_that_is_not_finite_stops_the_run(run: TrainConfig, tmp_path: Path) -> None:
    trainer = Trainer(into(run, tmp_path))
    trainer.run(limit=2)
    before = (tmp_path / "state.safetensors").read_bytes()
    with torch.no_grad():
        trainer.model.blocks[0].ln1.w[0] = torch.nan
    with pytest.raises(FloatingPointError, match="step 2: the gradient norm is nan"):
        trainer.run()
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_missing_inputs_are_named(run: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer: no such file"):
        Trainer(into(run, tmp_path, tokenizer=tmp_path / "none.json"))
    with pytest.raises(CorpusError, match=r"none\.bin: no token file here"):
        Trainer(into(run, tmp_path, train_tokens=tmp_path / "none.bin"))


def test_configurations_are_strict(run: TrainConfig, tmp_path: Path) -> None:
    raw = json.loads(run.model_dump_json())
    assert parse_config(TrainConfig, raw, "here") == run
    for change, message in (
        ({"colour": 1}, r"here: colour: Extra inputs"),
        ({"batch": "4"}, r"here: batch: .*found '4'"),
        ({"tokens": 0}, r"here: tokens: "),
        ({"model": raw["model"] | {"depth": 2}}, r"here: model\.depth: Extra inputs"),
        ({"model": raw["model"] | {"active_experts": 99}}, r"expected active_experts <= routed_experts"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(TrainConfig, raw | change, "here")
    path = tmp_path / "c.yaml"
    with pytest.raises(ConfigError, match="no such file"):
        load_train_config(path)
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="not YAML"):
        load_train_config(path)
    path.write_text(json.dumps(raw))  # JSON is YAML, its numbers such as 1e-06 included
    assert load_train_config(path) == run
