"""Are items scored as defined, and do ablation effects say what changed and how sure that is?"""

from __future__ import annotations

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from engram_interp.hooks import ablate, collect_memory_statistics
from engram_interp.probes.ablation import FULL, Condition, ablation_effects, default_conditions
from engram_interp.probes.scoring import encode_items, score_items, shared_runs
from engram_interp.probes.task_items import Item
from engram_interp.probes.tasks import DATA_TASKS, GENERATED_ITEMS, GENERATED_TASKS, Task, load_tasks

ITEMS = (
    Item("a", "The Prince of", (" Wales",), "x"),
    Item("b", "The river Seine flows through", (" Paris", " London", " Vienna to the sea"), "x"),
    Item("c", "", ("The castle was old.", "The old was castle.")),
    Item("d", (5, 9, 7, 5, 9), ((7,),)),
)


TEXTS = ("Diana, Princess of Wales, was born in Norfolk.", "On the other hand, the castle was old.")


def plain_score(model, item: Item) -> tuple[list[float], bool]:
    """The obvious version: one text at a time, every logit."""
    logprobs, solved = [], False
    for number, choice in enumerate(item.choices):
        prompt, answer = (
            list(t) if isinstance(t, tuple) else model.tokenizer.encode(t, add_special_tokens=False).ids
            for t in (item.prompt, choice)
        )
        tokens = torch.tensor([[model.cfg.bos_id, *prompt, *answer]])
        predicted = model(tokens)[0, len(prompt) : -1].log_softmax(-1)
        logprobs.append(float(predicted[torch.arange(len(answer)), answer].sum()))
        if number == 0:
            solved = predicted.argmax(-1).tolist() == answer
    return logprobs, solved if len(item.choices) == 1 else logprobs[0] > max(logprobs[1:])


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_scores_equal_the_plain_ones_in_every_batch_size(tiny_engram, batch_tokens):
    conditions = [nullcontext, lambda: ablate(tiny_engram, "output_zero")]
    scores = score_items(tiny_engram, ITEMS, conditions, batch_tokens=batch_tokens)
    for row, condition in enumerate(conditions):
        for i, item in enumerate(ITEMS):
            with condition():
                logprobs, solved = plain_score(tiny_engram, item)
            assert scores.logprob[row, i] == pytest.approx(logprobs[0], abs=1e-3)
            assert scores.correct[row, i] == float(solved)
            if len(logprobs) > 1:
                assert scores.margin[row, i] == pytest.approx(logprobs[0] - max(logprobs[1:]), abs=1e-3)
    assert (scores.kl[0] == 0).all() and (scores.kl[1] > 0).all()
    assert np.isnan(scores.margin[0, [0, 3]]).all()


def test_a_prefix_is_read_once_and_the_last_token_of_an_answer_never(tiny_engram):
    items = (Item("a", (5, 6), ((7,), (8,), (9,))), Item("b", (5, 6), ((7, 8, 9), (7, 3), (4, 4))))
    encoded = encode_items(tiny_engram, items)
    runs = shared_runs(encoded)
    assert [run.tokens for run in runs] == [(0, 5, 6), (0, 5, 6, 7, 8), (0, 5, 6, 4)]
    assert [run.places for run in runs] == [(2,), (2, 3, 4), (3,)]
    asked = [(run.item, *pair) for run in runs for pairs in run.asked for pair in pairs]
    assert sorted(asked) == sorted((e.item, e.choice, t) for e in encoded for t in e.targets)


@pytest.mark.parametrize("block", [1, 3])
def test_a_condition_that_starts_at_its_first_block_changes_no_bit(tiny_engram, block):
    tokens = tiny_engram.to_tokens("The river Seine flows through Paris.")
    sites = tiny_engram.residuals(tokens)
    with ablate(tiny_engram, "resample", blocks=[block], statistics=collect_memory_statistics(tiny_engram, TEXTS)):
        whole, resumed = tiny_engram.residuals(tokens)[-1], tiny_engram.resume(tokens, sites[block], block)
    assert torch.equal(whole, resumed) and not torch.equal(whole, sites[-1])
    conditions = [nullcontext, lambda: ablate(tiny_engram, "output_zero", blocks=[block])]
    whole, resumed = (score_items(tiny_engram, ITEMS, conditions, first_blocks=f) for f in (None, [0, block]))
    for name in ("logprob", "correct", "kl"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(resumed, name))
    with pytest.raises(ValueError, match=r"a first block per condition \(2\), found 1"):
        score_items(tiny_engram, ITEMS, conditions, first_blocks=[0])


def test_a_greedy_answer_counts_as_solved(tiny_engram):
    best = int(tiny_engram(tiny_engram.to_tokens("The river"))[0, -1].argmax())
    items = (Item("best", "The river", ((best,),)), Item("other", "The river", (((best + 1) % 600,),)))
    assert score_items(tiny_engram, items, [nullcontext]).correct.tolist() == [[1.0, 0.0]]


def test_long_prompts_lose_their_beginning(tiny_engram):
    (encoded,) = encode_items(tiny_engram, [Item("long", tuple(range(3, 203)), ((7, 8),))])
    assert len(encoded.tokens) == tiny_engram.context
    assert encoded.tokens[0] == 0 and encoded.tokens[-3:] == (202, 7, 8) and encoded.targets == (7, 8)
    with pytest.raises(ValueError, match="continuation of 1 to 63 tokens, found 80"):
        encode_items(tiny_engram, [Item("x", "", (tuple(range(3, 83)),))])


def test_generated_tasks_are_seeded_and_well_formed(tokenizer):
    first, again, other = (load_tasks(GENERATED_TASKS, tokenizer, limit=20, seed=s) for s in (1, 1, 2))
    assert first == again and first != other
    by = {task.name: task for task in first}
    assert by["arithmetic"].chance == 0.25 and by["induction"].chance == 0.0
    for item in by["arithmetic"].items:
        a, b = item.prompt.rsplit(", ", 1)[1].removesuffix(" =").split(" + ")
        assert item.choices[0] == f" {int(a) + int(b)}" and len(set(item.choices)) == 4
    for item in by["induction"].items:
        cut = len(item.prompt) - 20
        assert item.prompt[:cut] == item.prompt[20:] and item.choices == ((item.prompt[cut],),)
    every = load_tasks(["arithmetic"], tokenizer, limit=None)[0]
    assert len(every.items) == GENERATED_ITEMS
    for item in by["gallery_entity"].items:
        assert item.choices[0].startswith(" ") and not item.prompt.endswith(" ")


def test_data_tasks_read_every_file(shared, tokenizer):
    pytest.importorskip("zstandard")
    tasks = load_tasks(DATA_TASKS, tokenizer, data=shared / "data", limit=6)
    assert [task.name for task in tasks] == list(DATA_TASKS)
    chances = {task.name: task.chance for task in tasks}
    assert chances["blimp"] == 0.5 and chances["lre"] == 0.25 and chances["wiki_entity"] == 0.0
    assert len(load_tasks(["known_1000"], tokenizer, data=shared / "data", limit=None)[0].items) > 100
    assert load_tasks(["lre"], tokenizer, data=shared / "data", limit=6) == [tasks[DATA_TASKS.index("lre")]]


def test_bad_data_is_named(tmp_path, tokenizer):
    zstandard = pytest.importorskip("zstandard")
    with pytest.raises(ValueError, match="unknown task 'nothing'"):
        load_tasks(["nothing"], tokenizer)
    with pytest.raises(ValueError, match="give the data folder"):
        load_tasks(["lre"], tokenizer)
    (tmp_path / "eval").mkdir()
    file = tmp_path / "eval" / "linguistic.blimp.jsonl.zst"
    with pytest.raises(ValueError, match="no such file"):
        load_tasks(["blimp"], tokenizer, data=tmp_path)
    file.write_bytes(zstandard.compress(b'{"UID": "x"}\n'))
    with pytest.raises(ValueError, match="sentence_good"):
        load_tasks(["blimp"], tokenizer, data=tmp_path)
    file.write_bytes(b"not zstd at all")
    with pytest.raises(ValueError, match="damaged"):
        load_tasks(["blimp"], tokenizer, data=tmp_path)


@pytest.fixture(scope="module")
def effects(tiny_engram, tokenizer, texts):
    easy = [int(tiny_engram(tiny_engram.to_tokens(t))[0, -1].argmax()) for t in texts]
    solved = Task("solved", "facts", tuple(Item(t, t, ((best,),)) for t, best in zip(texts, easy, strict=True)), "test")
    hopeless = load_tasks(["arithmetic"], tokenizer, limit=12)[0]
    statistics = collect_memory_statistics(tiny_engram, texts[:3])
    conditions = [*default_conditions(tiny_engram), Condition(kind="gate_scale", options={"scale": 1.0}, name="same")]
    return ablation_effects(tiny_engram, [solved, hopeless], conditions, statistics=statistics)


def test_effects_are_paired_and_not_estimable_at_chance(effects):
    table = effects.table().set_index(["task", "condition"])
    assert len(table) == 2 * (6 * 3 + 1)
    same = table.loc[("solved", "same")]
    assert same["score_full"] == same["score"] == same["retained"] == same["retained_above_chance"] == 1.0
    assert same["change_logprob"] == same["kl"] == 0.0
    zero = table.loc[("solved", "output_zero")]
    assert zero["retained"] < 0.7 and zero["change_logprob_high"] < 0 < zero["change_loss_low"]
    assert zero["retained_low"] <= zero["retained"] <= zero["retained_high"]
    hopeless = table.loc[("arithmetic", "output_zero")]
    assert np.isnan(hopeless["retained"]) and "cannot be told from chance" in hopeless["reason"]
    raw = effects.items.query("task == 'solved'").pivot(index="item", columns="condition", values="logprob")
    assert (raw["output_zero"] - raw[FULL]).mean() == pytest.approx(zero["change_logprob"])


def test_interaction_is_joint_minus_the_sum_of_blocks(effects):
    got = effects.interaction().set_index(["task", "condition"])
    mean = effects.items.groupby(["task", "condition"])["logprob"].mean()
    for task in ("solved", "arithmetic"):
        change = {c: mean[task, c] - mean[task, FULL] for c in ("mean", "mean @ block 1", "mean @ block 3")}
        expected = change["mean"] - change["mean @ block 1"] - change["mean @ block 3"]
        assert got.loc[(task, "mean"), "excess_logprob"] == pytest.approx(expected)


def test_effects_become_json_and_a_figure(effects):
    plain = json.loads(json.dumps(effects.as_dict()))
    assert plain["model"] == "tiny-engram" and len(plain["rows"]) == len(effects.table())
    names = [trace.name for trace in effects.figure().data]
    assert names == ["output_zero", "mean", "resample", "hash_permute", "equal_norm_random", "mlp_zero", "same"]
    assert effects.provenance.models == {"tiny-engram": effects.provenance.models["tiny-engram"]}


def test_provenance_names_the_seed_a_condition_really_drew_with(tiny_engram, texts):
    """A given name hides the options from the label, and another seed gives other numbers: the record keeps them."""
    task = Task("t", "facts", tuple(Item(t, t, ((5,),)) for t in texts[:3]), "test")

    def measured(*conditions: Condition):
        effects = ablation_effects(tiny_engram, [task], conditions)
        logprobs = effects.items.pivot(index="item", columns="condition", values="logprob")
        return logprobs, effects.provenance.options["condition_options"]

    random = lambda seed, name="": Condition(kind="equal_norm_random", options={"seed": seed}, name=name)  # noqa: E731
    logprobs, recorded = measured(random(3, "noise"), random(4), Condition(kind="equal_norm_random"))
    assert recorded == {"noise": {"seed": 3}, "equal_norm_random seed=4": {"seed": 4}}
    again, _ = measured(*(random(seed) for seed in (0, 3, 4)))
    for name, seed in (("noise", 3), ("equal_norm_random seed=4", 4), ("equal_norm_random", 0)):  # unnamed: 0
        assert logprobs[name].tolist() == again[f"equal_norm_random seed={seed}"].tolist()
    assert (logprobs["noise"] - logprobs["equal_norm_random seed=4"]).abs().min() > 1e-4


def test_conditions_are_checked_before_anything_runs(tiny_engram):
    task = Task("t", "f", ITEMS, "test")
    with pytest.raises(ValueError, match="unknown kind 'nothing'"):
        ablation_effects(tiny_engram, [task], [Condition(kind="nothing")])
    with pytest.raises(ValueError, match="distinct labels"):
        ablation_effects(tiny_engram, [task], [Condition(kind="output_zero"), Condition(kind="output_zero")])
    with pytest.raises(ValueError, match="extra"):
        Condition(kind="output_zero", block=[1])
