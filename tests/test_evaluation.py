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
