"""The memory monitor: its numbers against plain recomputation, in our loop and in Hugging Face's Trainer."""

import json

import numpy as np
import pytest
import torch

from engram_interp.training.monitor import MemoryMonitor, trainer_callback
from engram_interp.training.train import loss_of


@pytest.fixture
def batches(fresh_engram):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, fresh_engram.vocab_size, (2, 20), generator=generator) for _ in range(5)]


def _train(model, monitor, batches):
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step, tokens in enumerate(batches):
        if monitor is not None:
            monitor.observe(tokens)
        loss_of(model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())[0].backward()
        if monitor is None:
            optimiser.step()
        else:
            with monitor.update(step):
                optimiser.step()
        optimiser.zero_grad()


def test_every_number_is_the_models_own(fresh_engram, batches, tmp_path):
    before = fresh_engram.engram(1).table.weight.detach().clone()
    monitor = MemoryMonitor(fresh_engram, tmp_path / "memory.jsonl", batches[0], every=5)
    _train(fresh_engram, monitor, batches[:1])
    after = fresh_engram.engram(1).table.weight.detach()
    records = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    assert [(r["step"], r["layer"]) for r in records] == [(0, 1), (0, 3)]
    first = records[0]
    assert first["update_norm"] == pytest.approx(float((after - before).norm()), rel=1e-5)
    assert first["weight_norm"] == pytest.approx(float(after.norm()), rel=1e-5)
    assert first["gradient_norm"] > 0
    engram_hash = fresh_engram.engram(1).ngram_hash
    rows = engram_hash.rows_of_slots(engram_hash.slots(batches[0]))
    assert first["rows_hit"] == len(rows.unique())
    assert first["rows"] == engram_hash.rows
    _, cache = fresh_engram.run_with_cache(batches[0])
    gate = cache["blocks.1.engram.hook_gate"].flatten(0, 1)
    np.testing.assert_allclose(first["gate_mean"], gate.mean(0).numpy(), rtol=1e-5)
    np.testing.assert_allclose(np.array(first["gate_quantiles"])[:, 2], gate.median(0).values.numpy(), atol=0.05)
    write, hidden = cache["blocks.1.hook_engram_out"], cache["blocks.1.hook_resid_pre"]
    assert first["write_share"] == pytest.approx(float(write.square().sum() / hidden.square().sum()), rel=1e-5)


def test_the_monitor_changes_no_weight_and_leaves_no_hook(fresh_engram, batches, tmp_path):
    import copy

    plain = copy.deepcopy(fresh_engram)
    _train(plain, None, batches)
    _train(fresh_engram, MemoryMonitor(fresh_engram, tmp_path / "m.jsonl", batches[0], every=2), batches)
    for name, parameter in fresh_engram.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name
    assert not any(point._forward_hooks for point in fresh_engram.hook_dict.values())
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 2 * 3


def test_a_model_without_memory_logs_nothing(tiny_moe, tmp_path):
    monitor = MemoryMonitor(tiny_moe, tmp_path / "m.jsonl", torch.randint(3, 100, (1, 8)))
    with monitor.update(0):
        pass
    assert not (tmp_path / "m.jsonl").exists()


def test_an_impossible_interval_is_refused(tiny_moe, tmp_path):
    with pytest.raises(ValueError, match="every >= 1, found 0"):
        MemoryMonitor(tiny_moe, tmp_path / "m.jsonl", torch.zeros(1, 1, dtype=torch.int64), every=0)


def test_it_rides_on_hugging_faces_trainer(fresh_engram, batches, tmp_path):
    from transformers import Trainer, TrainingArguments

    class Wrapped(torch.nn.Module):
        def __init__(self, house):
            super().__init__()
            self.house = house

        def forward(self, input_ids, labels=None):
            loss = loss_of(self.house, input_ids[:, :-1].contiguous(), input_ids[:, 1:].contiguous())[0]
            return {"loss": loss}

    monitor = MemoryMonitor(fresh_engram, tmp_path / "m.jsonl", batches[0], every=2)
    rows = [{"input_ids": row, "labels": row} for batch in batches for row in batch]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "hf"), max_steps=4, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(Wrapped(fresh_engram), arguments, train_dataset=rows, callbacks=[trainer_callback(monitor)]).train()
    records = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [0, 0, 2, 2]
    assert records[-1]["rows_hit"] > records[0]["rows_hit"] > 0
    assert all(r["update_norm"] > 0 for r in records)


def test_the_curves_and_the_card_show_what_was_logged(fresh_engram, batches, tmp_path, training_run):
    from engram_interp.figures.monitor import monitor_figure
    from engram_interp.studies.card import CURVES, model_card
    from engram_interp.studies.evaluation import evaluate

    _train(fresh_engram, MemoryMonitor(fresh_engram, tmp_path / "m.jsonl", batches[0], every=1), batches)
    records = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    figure = monitor_figure(records, tokens_per_step=2_000_000, title="t")
    lines = {(trace.name, trace.yaxis): trace for trace in figure.data}
    own = [r for r in records if r["layer"] == 3]
    gate = lines["block 3 branch 1", "y"]
    assert list(gate.y) == [r["gate_mean"][1] for r in own]
    assert list(gate.x) == [2.0 * r["step"] for r in own]
    assert list(lines["block 3, all branches", "y3"].y) == [r["rows_hit"] / r["rows"] for r in own]
    shown = {trace.name: (trace.line.color, trace.line.dash) for trace in figure.data}
    assert len(set(shown.values())) == len(shown), "no style means two things"
    with pytest.raises(ValueError, match="found none"):
        monitor_figure([], tokens_per_step=1, title="t")

    card = model_card(training_run, evaluate(fresh_engram, limit=8), "run.yaml", records)
    assert f"]({CURVES})" in card
    last = own[-1]
    assert f"{last['rows_hit'] / last['rows']:.2%}" in card
    assert "## The memory while training" not in model_card(training_run, evaluate(fresh_engram, limit=8), "run.yaml")
