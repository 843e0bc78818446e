"""The evaluation suite against plain recomputation, on a data folder made here and without one."""

import json

import numpy as np
import pytest
import torch
import zstandard

from engram_interp.studies.evaluation import HELD_OUT, article_losses, compare_evaluations, evaluate


@pytest.fixture(scope="module")
def data(tmp_path_factory, texts):
    """A data folder with articles and one task only."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "eval").mkdir()
    articles = [{"title": f"article {i}", "text": " ".join(texts[i : i + 8])} for i in range(4)]
    copies = [
        {"prefix": "the", "target": "castle", "prompt": f"{text} The castle and the", "title": f"t{i}",
         "distance_words": 9, "train_bigram_count": 0, "train_target_count": 3}
        for i, text in enumerate(texts[:6])
    ]  # fmt: skip
    for name, rows in ((HELD_OUT, articles), ("eval/context.wiki_context_copy.jsonl.zst", copies)):
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / name).write_bytes(zstandard.compress(lines))
    return folder


def test_article_loss_counts_every_token_once(tiny_engram, texts):
    loss, tokens, size = article_losses(tiny_engram, [texts[0], " ".join(texts)])
    ids = tiny_engram.to_tokens(texts[0])
    expected = torch.nn.functional.cross_entropy(tiny_engram(ids)[0, :-1], ids[0, 1:], reduction="sum")
    assert loss[0] == pytest.approx(float(expected), rel=1e-5)
    assert tokens.tolist() == [
        len(tiny_engram.tokenizer.encode(t, add_special_tokens=False).ids) for t in (texts[0], " ".join(texts))
    ]
    assert tokens[1] > tiny_engram.context
    assert size.tolist() == [len(texts[0].encode()), len(" ".join(texts).encode())]


def test_windows_read_together_lose_what_they_lose_alone(tiny_engram, tiny_moe, texts):
    articles = [texts[0], " ".join(texts), texts[1][:9], " ".join(texts[3:])]
    for model in (tiny_engram, tiny_moe):
        together, alone = article_losses(model, articles), article_losses(model, articles, batch_tokens=1)
        np.testing.assert_allclose(together[0] / together[1], alone[0] / alone[1], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(together[1:], alone[1:])


def test_suite_on_a_data_folder_leaves_out_what_is_missing(tiny_engram, data):
    result = evaluate(tiny_engram, data)
    assert set(result.scores) == {"heldout_loss", "context_copy", "induction"}
    assert set(result.missing) == {"phrase_entity", "phrase_generic", "lre", "known_1000", "lambada", "blimp"}
    frame = result.items[result.items.task == "heldout_loss"]
    score = result.scores["heldout_loss"]
    assert score.value.value == pytest.approx(frame.loss.sum() / frame.tokens.sum())
    assert score.value.low < score.value.value < score.value.high
    bits = frame.loss.sum() / np.log(2) / frame.bytes.sum()
    assert result.bits_per_byte.value == pytest.approx(bits)
    plain = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert plain["scores"]["context_copy"]["n"] == 6
    assert plain["scores"]["context_copy"]["chance"] == 0


def test_the_same_numbers_to_the_last_digit(tiny_engram, data):
    first, second = (json.dumps(evaluate(tiny_engram, data).as_dict()["scores"]) for _ in range(2))
    assert first == second


def test_without_data_the_gallery_and_generated_tasks_run(tiny_engram):
    result = evaluate(tiny_engram, limit=20)
    assert set(result.scores) == {"phrase_entity", "phrase_generic", "induction", "arithmetic"}
    assert "heldout_loss" in result.missing
    assert len(result.table()) == 4


def test_two_models_compare_item_by_item(tiny_engram, tiny_moe, data):
    a, b = evaluate(tiny_engram, data), evaluate(tiny_moe, data)
    table = compare_evaluations(a, b).set_index(["task", "quantity"])
    gap = a.scores["heldout_loss"].value.value - b.scores["heldout_loss"].value.value
    assert table.loc[("heldout_loss", "nats per token"), "difference"] == pytest.approx(gap)
    same = compare_evaluations(a, a)
    assert (same[["difference", "low", "high"]].to_numpy() == 0).all()
    with pytest.raises(ValueError, match="same items"):
        compare_evaluations(a, evaluate(tiny_moe, data, articles=3))


def test_a_folder_that_is_not_there_is_named(tiny_engram, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        evaluate(tiny_engram, tmp_path / "nowhere")


def test_the_model_card_states_the_numbers_it_was_given(tiny_engram, tmp_path):
    from pathlib import Path

    from engram_interp.models.cost import parameter_count
    from engram_interp.studies.card import model_card
    from engram_interp.training.config import load_train_config

    root = Path(__file__).resolve().parents[1]
    config = load_train_config(root / "experiments/configs/mini/mini-engram.yaml")
    result = evaluate(tiny_engram, limit=20)
    card = model_card(config, result, "experiments/configs/mini/mini-engram.yaml")
    assert f"{parameter_count(config.model):,}" in card
    assert f"{config.steps * config.tokens_per_step:,}" in card
    for name, score in result.scores.items():
        assert f"| {name} | {score.value.value:.4f} [" in card


# -- facts by rank, hub tasks, run folder ----------------------------------------------------------------------------


def test_facts_are_ranked_among_all_objects_of_their_relation(tiny_engram, shared):
    from contextlib import nullcontext

    from engram_interp.probes.scoring import score_items
    from engram_interp.probes.tasks import load_tasks

    few, every = (
        load_tasks(["lre"], tiny_engram.tokenizer, data=shared / "data", limit=4, distractors=d)[0] for d in (3, None)
    )
    assert {len(item.choices) for item in few.items} == {4}
    assert [item.choices[0] for item in few.items] == [item.choices[0] for item in every.items]
    assert max(len(item.choices) for item in every.items) > 10
    item = every.items[0]
    scores = score_items(tiny_engram, [item, item], [nullcontext])
    alone = [
        score_items(tiny_engram, [type(item)("a", item.prompt, (choice,))], [nullcontext]).logprob[0, 0]
        for choice in item.choices
    ]
    expected = np.mean([alone[0] > other for other in alone[1:]])
    assert scores.rank[0] == pytest.approx([expected, expected])


def test_equal_probabilities_rank_in_the_middle(tiny_engram):
    from contextlib import nullcontext

    from engram_interp.probes.scoring import score_items
    from engram_interp.probes.task_items import Item

    scores = score_items(
        tiny_engram, [Item("same", "The", (" castle", " castle")), Item("open", "The", (" castle",))], [nullcontext]
    )
    assert scores.rank[0, 0] == 0.5
    assert np.isnan(scores.rank[0, 1])


def test_hub_tasks_read_a_data_set_of_the_same_form(tiny_engram, tmp_path, monkeypatch):
    from engram_interp.probes.tasks import load_tasks

    folder = tmp_path / "mine"
    folder.mkdir()
    lines = [{"text": f"The {word} of the old castle by the river"} for word in ("king", "gate", "lord")]
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    task = load_tasks([f"hub:lambada={folder}"], tiny_engram.tokenizer)[0]
    assert [item.prompt for item in task.items] == [line["text"].removesuffix(" river") for line in lines]
    assert {item.choices for item in task.items} == {(" river",)}
    result = evaluate(tiny_engram, limit=5, hub=[f"hub:lambada={folder}"])
    assert result.scores[f"hub:lambada={folder}"].value.rows == 3
    with pytest.raises(ValueError, match="not the records of popqa"):
        load_tasks([f"hub:popqa={folder}"], tiny_engram.tokenizer)


def test_without_a_network_hub_tasks_say_so(tiny_engram, tmp_path):
    from engram_interp.probes.tasks import load_tasks

    with pytest.raises(ValueError, match="cannot be read from the Hugging Face hub"):
        load_tasks(["hub:blimp"], tiny_engram.tokenizer)
    with pytest.raises(ValueError, match="unknown task 'hub:nothing'"):
        load_tasks(["hub:nothing"], tiny_engram.tokenizer)


def test_without_the_package_hub_tasks_name_it(tiny_engram, monkeypatch):
    import sys

    from engram_interp.probes.tasks import load_tasks

    monkeypatch.setitem(sys.modules, "datasets", None)  # what an import sees where it is not installed
    with pytest.raises(ValueError, match=r"engram-interp\[hub\]"):
        load_tasks(["hub:lambada"], tiny_engram.tokenizer)


def test_the_command_keeps_scores_items_and_differences(tiny_engram, tiny_moe, data, tmp_path):
    from engram_interp.models.checkpoint import save_model
    from engram_interp.runs.folder import open_run
    from engram_interp.studies.evaluation_command import run_evaluate

    options = {"items": 20, "articles": None, "seed": 0, "hub": ()}
    for name, model in (("engram", tiny_engram), ("moe", tiny_moe)):
        save_model(model, model.tokenizer, tmp_path / name)
    names = (str(tmp_path / "engram"), str(tmp_path / "moe"))
    results, differences, folder = run_evaluate(names, data, **options, out=tmp_path / "run")
    run = open_run(folder)
    assert run.manifest.status == "done"
    first, second = (result.model for result in results)
    kept = run.table(f"items.{first}")
    assert kept.loc[kept.task == "context_copy", "item"].tolist() == [f"wiki_context_copy.{n}" for n in range(1, 7)]
    assert run.table(f"difference.{second}").equals(differences[0])
    difference = run.table(f"difference.{second}").set_index(["task", "quantity"])
    gap = results[0].scores["heldout_loss"].value.value - results[1].scores["heldout_loss"].value.value
    assert difference.loc[("heldout_loss", "nats per token"), "difference"] == pytest.approx(gap)
    again, _, same = run_evaluate(names, data, **options, out=tmp_path / "run")
    assert same == folder
    assert json.dumps(again[0].as_dict()["scores"]) == json.dumps(results[0].as_dict()["scores"])
    assert json.loads((folder / f"{first}.json").read_text())["scores"] == json.loads(
        json.dumps(results[0].as_dict()["scores"])
    )
