"""Do the numbers behind the dashboard's pictures agree with the probes, and is the picture inert?"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch

from engram_interp.figures.lens_map import lens_map
from engram_interp.figures.token_strip import describe, hover_texts, strip_data, strip_svg
from engram_interp.hooks import ablate
from engram_interp.models.watched import WatchedModel
from engram_interp.probes.continuation import continuations
from engram_interp.probes.gates import read_gates
from engram_interp.probes.lens import logit_lens_kl
from engram_interp.probes.memory_site import hash_of, site_of, token_ids
from engram_interp.probes.token_effects import token_effects
from engram_interp.probes.token_memory import ngram_labels, slot_numbers, token_memory, write_norms
from engram_interp.probes.token_readings import align, difference, effect_grid, shared_range, token_readings

TEXT = "By the way, Alexander the Great was a king of Macedon."


def test_effects_are_those_of_two_plain_forwards(tiny_engram):
    result = token_effects(tiny_engram, TEXT)
    tokens = tiny_engram.to_tokens(TEXT)
    full = tiny_engram(tokens)[0].log_softmax(-1)
    with ablate(tiny_engram, "output_zero"):
        without = tiny_engram(tokens)[0].log_softmax(-1)
    at = torch.arange(tokens.shape[1] - 1)
    expected = (full - without)[at, tokens[0, 1:]].numpy()
    np.testing.assert_allclose(result.change[:-1], expected, atol=2e-5)
    assert np.isnan(result.change[-1]) and result.rank[0, -1] == 0
    kl = (full.exp() * (full - without)).sum(-1).numpy()
    np.testing.assert_allclose(result.kl, kl, atol=2e-5)
    assert result.top_ids[0, 3, 0] == full[3].argmax() and result.top_ids[1, 3, 0] == without[3].argmax()
    rank = 1 + int((full[3] > full[3, tokens[0, 4]]).sum())
    assert result.rank[0, 3] == rank
    assert result.following[:-1] == result.tokens[1:]


def test_effects_of_a_stretch_are_those_of_the_whole_text(tiny_engram):
    text = " ".join([TEXT] * 6)  # several windows of 64 tokens
    whole = token_effects(tiny_engram, text)
    assert len(whole.tokens) > 64
    part = token_effects(tiny_engram, text, positions=(50, 75))
    assert (part.first, part.tokens) == (50, whole.tokens[50:75])
    np.testing.assert_array_equal(part.change, whole.change[50:75])
    assert part.following == whole.following[50:75]
    assert part.predictions(60).equals(whole.predictions(60))
    with pytest.raises(ValueError, match=r"position in \[50, 75\)"):
        part.predictions(75)


def test_effects_as_json_have_no_nan(tiny_engram):
    record = json.loads(json.dumps(token_effects(tiny_engram, TEXT, blocks=(1,)).as_dict(), allow_nan=False))
    assert record["change"][-1] is None and record["condition"] == "output_zero, block 1"


@pytest.mark.parametrize(
    ("text", "options", "match"), [("", {}, "empty"), (TEXT, {"positions": (900, 901)}, "position")]
)
def test_effects_refuse(tiny_engram, text, options, match):
    with pytest.raises(ValueError, match=match):
        token_effects(tiny_engram, text, **options)


def test_token_memory_reads_the_rows_the_hash_names(tiny_engram):
    ids = next(token_ids(tiny_engram, [TEXT]))
    site = site_of(tiny_engram, 3)
    slots = hash_of(site).slots(torch.from_numpy(ids)[None])[0].numpy()
    np.testing.assert_array_equal(slot_numbers(tiny_engram, ids, block=3), slots)
    memory = token_memory(tiny_engram, TEXT, 7, block=3)
    assert [row.address.slot for row in memory.rows] == slots[7].tolist()
    rows = site.rows.read(np.array([row.address.row for row in memory.rows]))
    np.testing.assert_allclose([row.norm for row in memory.rows], np.linalg.norm(rows, axis=1), rtol=1e-6)
    gates = read_gates(tiny_engram, TEXT)
    assert memory.write_norm == pytest.approx(float(gates.write_norm[7, 1]), rel=1e-5)
    assert memory.hidden_norm == pytest.approx(float(gates.hidden_norm[7, 1]), rel=1e-5)
    known = write_norms(tiny_engram, TEXT, 3)
    np.testing.assert_allclose(known.write, gates.write_norm[:, 1], rtol=1e-5)
    again = token_memory(tiny_engram, TEXT, 7, block=3, norms=known)
    assert (again.gated_norm, again.conv_norm) == (memory.gated_norm, memory.conv_norm)
    assert memory.sources == (7, 4, 1)
    assert ngram_labels(tiny_engram, ids, block=3, first=7)[0][0] == memory.rows[0].ngram


def test_token_memory_names_others_in_the_slot(tiny_engram, texts):
    from engram_interp.memory.ngram_counts import count_ngrams

    site = site_of(tiny_engram, 1)
    corpus = count_ngrams(hash_of(site), token_ids(tiny_engram, texts))
    memory = token_memory(tiny_engram, TEXT, 5, block=1, corpus=corpus)
    row = memory.rows[0]
    seen = set()
    for ids in token_ids(tiny_engram, texts):
        slots = slot_numbers(tiny_engram, ids, block=1)[:, 0]
        labels = ngram_labels(tiny_engram, ids, block=1)
        seen |= {labels[t][0] for t in np.flatnonzero(slots == row.address.slot)}
    assert {text for text, _ in row.others} == seen - {row.ngram}
    assert memory.shared == sum(bool(r.others) for r in memory.rows) > 0
    assert memory.corpus_tokens == corpus.tokens


def test_readings_reduce_branches_and_keep_them_all(tiny_engram):
    gates = read_gates(tiny_engram, TEXT)
    mean = token_readings(gates, layer=3)
    np.testing.assert_allclose(mean.shown, gates.gates[:, 1].mean(1))
    np.testing.assert_allclose(token_readings(gates, layer=3, branch="max").shown, gates.gates[:, 1].max(1))
    np.testing.assert_allclose(token_readings(gates, layer=1, branch=1).shown, gates.gates[:, 0, 1])
    assert mean.grid.shape == (4, len(gates.tokens)) and (mean.low, mean.high) == (0.0, 1.0)
    np.testing.assert_allclose(mean.grid[3], gates.gates[:, 1, 1])
    write = token_readings(gates, "write", layer=1)
    np.testing.assert_allclose(write.shown, gates.write_norm[:, 0] / gates.hidden_norm[:, 0])
    score = token_readings(gates, "score")
    assert score.low == -score.high < 0
    window = mean.window(3, 6)
    assert window.tokens == gates.tokens[3:6] and window.high == mean.high
    with pytest.raises(ValueError, match="layer among"):
        token_readings(gates, layer=2)


def test_effect_readings_show_each_memory(tiny_engram):
    gates = read_gates(tiny_engram, TEXT)
    effects = [token_effects(tiny_engram, TEXT, blocks=b, positions=(2, 9)) for b in (None, (1,), (3,))]
    readings = token_readings(gates, "effect", layer=3, effects=effects)
    assert readings.tokens == gates.tokens[2:9] and readings.blocks == (-1, 1, 3)
    np.testing.assert_allclose(readings.grid[2], effects[2].change)
    np.testing.assert_allclose(readings.bars, gates.gates[2:9, 1])
    with pytest.raises(ValueError, match="each of"):
        token_readings(gates, "effect", effects=effects[:2])
    both = effect_grid(effects[:2])
    assert both.labels == ("output_zero, all memories", "output_zero, block 1") and both.high == -both.low


def test_difference_follows_shared_tokens(tiny_engram):
    a = token_readings(read_gates(tiny_engram, "The Prince of Wales lives in London."))
    b = token_readings(read_gates(tiny_engram, "The old Prince of Wales lives in London."))
    pairs = align(a, b)
    assert all(a.tokens[i] == b.tokens[j] for i, j in pairs) and len(pairs) >= len(a.tokens) - 2
    gap = difference(a, b)
    i, j = pairs[-1]
    assert gap.shown[-1] == pytest.approx(b.shown[j] - a.shown[i])
    assert gap.low == -gap.high
    unlike = token_readings(read_gates(tiny_engram, "Zürich 東京 naïve café words many bytes"))
    assert difference(a, unlike) is None
    assert np.abs(difference(a, a).shown).max() == 0


def test_shared_range_is_the_wider_one(tiny_engram):
    a, b = (token_readings(read_gates(tiny_engram, t), "score") for t in (TEXT, "The fox jumps over the dog."))
    low, high = min(a.low, b.low), max(a.high, b.high)
    assert all((r.low, r.high) == (low, high) for r in shared_range(a, b))


def strip_of(model, text: str) -> dict:
    gates = read_gates(model, text)
    r = token_readings(gates)
    ids = gates.token_ids
    hover = hover_texts(
        r.tokens,
        ngram_labels(model, ids),
        slot_numbers(model, ids),
        gates.gates[:, 0],
        gates.scores[:, 0],
        gates.write_norm[:, 0],
        layer=1,
    )
    return strip_data(
        r.tokens,
        r.shown,
        r.bars,
        r.grid,
        r.labels,
        low=r.low,
        high=r.high,
        unit="gate",
        hover=hover,
        blocks=r.blocks,
        middle="no evidence",
    )


def test_strip_svg_is_valid_and_inert(tiny_engram):
    data = strip_of(tiny_engram, '<script>alert(1)</script> & "quotes" 東京 🙂\nnext line')
    svg = strip_svg(data, "model <b> & caption")
    root = ElementTree.fromstring(svg)
    names = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert names == {"svg", "style", "rect", "text", "title"}
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert "model <b> & caption" in texts
    assert sum(t in data["tokens"] for t in texts) >= len(data["tokens"])
    fills = sum(e.tag.endswith("rect") for e in root.iter())
    assert fills >= len(data["tokens"]) * (1 + 2 + 4)  # box, two bars, four rows of the grid


def test_strip_data_is_plain_and_says_where_it_peaks(tiny_engram):
    data = json.loads(json.dumps(strip_of(tiny_engram, TEXT), allow_nan=False))
    peak = int(np.argmax(data["shown"]))
    assert f"token {peak} {data['tokens'][peak]}" in describe(data)
    assert "2-gram" in data["hover"][5] and "gate by branch" in data["hover"][5] and "slots" in data["hover"][5]
    with pytest.raises(ValueError, match="one entry per token"):
        strip_data(
            ["a"],
            np.zeros(1),
            np.zeros((1, 2)),
            np.zeros((1, 1)),
            ["row"],
            low=0.0,
            high=1.0,
            unit="x",
            hover=["a", "b"],
        )


def test_lens_map_marks_memories_and_names_choices(tiny_engram):
    result = logit_lens_kl(tiny_engram, [TEXT])
    tokens = [str(t) for t in result.token_ids]
    choices = [[str(c) for c in row] for row in result.top1]
    figure = lens_map(result.kl.astype(np.float64), tokens, choices, title="t", unit="nats", memories=(1, 3))
    assert len(figure.layout.shapes) == 2
    assert np.asarray(figure.data[0].z)[-1].max() == 0
    with pytest.raises(ValueError, match="values and choices"):
        lens_map(result.kl.astype(np.float64), tokens[1:], choices, title="t", unit="nats")


def test_continuations_are_greedy_and_say_where_they_part(tiny_engram):
    written = continuations(tiny_engram, TEXT, kind="resample", steps=5, statistics=statistics(tiny_engram))
    tokens = tiny_engram.to_tokens(TEXT)
    logits = tiny_engram(tokens)[0, -1]
    logits[:3] = -torch.inf  # <bos>, <eos>, <pad> are never written
    first = logits.argmax()
    assert written.with_memory[0] == tiny_engram.tokenizer.decode([int(first)], skip_special_tokens=False)
    same = next((i for i in range(5) if written.with_memory[i] != written.without[i]), None)
    assert written.parted == same
    assert continuations(tiny_engram, TEXT, kind="gate_scale", steps=4, scale=1.0).parted is None


def statistics(model):
    from engram_interp.hooks import collect_memory_statistics

    return collect_memory_statistics(model, ["The river Seine flows through Paris to the sea.", "New York is a town."])


def test_a_watched_model_gives_the_same_numbers_and_can_be_stopped(tiny_engram):
    ticks = []
    watched = WatchedModel(tiny_engram, lambda: ticks.append(1))
    texts = ["The Prince of Wales lives in London.", TEXT]
    np.testing.assert_array_equal(logit_lens_kl(watched, texts).kl, logit_lens_kl(tiny_engram, texts).kl)
    assert len(ticks) == 2
    assert watched.engram_layers == (1, 3)

    def stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        logit_lens_kl(WatchedModel(tiny_engram, stop), texts)
    with tiny_engram.lock:
        pass  # was released
