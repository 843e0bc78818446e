"""Does an edit change the fact it names, only through the rows it names, and reach exactly as far as it must?"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from engram_interp.hooks.overlay import Overlay, OverlayError, RowEdit, apply_overlay, load_overlay, save_overlay
from engram_interp.probes.editing import edit_slots
from engram_interp.probes.specificity import edit_specificity

PROMPT, TARGET = "The Prince of Wales lives in", " Vienna"
CONTINUATION = " and the river flows to the sea by the way of the old town."


@pytest.fixture(scope="module", params=["closed_form", "gradient"])
def edit(request, tiny_engram):
    return edit_slots(tiny_engram, PROMPT, TARGET, method=request.param, steps=80)


def test_the_edit_takes_and_goes_away(tiny_engram, edit):
    tokens = tiny_engram.to_tokens(PROMPT)
    before = tiny_engram(tokens)
    target = tiny_engram.tokenizer.encode(TARGET).ids[0]
    with apply_overlay(tiny_engram, edit.overlay):
        edited = tiny_engram(tokens)[0, -1]
    assert edit.success and int(edited.argmax()) == target
    assert edit.logprob_after == pytest.approx(float(edited.log_softmax(-1)[target]), abs=1e-5)
    assert edit.logprob_before == pytest.approx(float(before[0, -1].log_softmax(-1)[target]), abs=1e-5)
    assert int(before[0, -1].argmax()) != target and edit.logprob_after > edit.logprob_before
    assert torch.equal(tiny_engram(tokens), before)
    assert edit.overlay.rows == 2 * 8 and edit.as_dict()["rows"] == 16


def test_an_overlay_equals_a_rewritten_table(tiny_engram, edit):
    rewritten = copy.deepcopy(tiny_engram)
    for block, rows in edit.overlay.edits.items():
        rewritten.engram(block).table.weight.data[rows.rows] = rows.values
    tokens = tiny_engram.to_tokens(PROMPT + CONTINUATION)
    with apply_overlay(tiny_engram, edit.overlay):
        assert torch.equal(tiny_engram(tokens), rewritten(tokens))


def test_an_edit_reaches_its_readers_the_convolution_and_later_positions_alone(tiny_engram, edit):
    first = Overlay({1: edit.overlay.edits[1]}, edit.overlay.weights_sha256)
    text = PROMPT + CONTINUATION
    report = edit_specificity(tiny_engram, first, [text])
    rows = report.positions.set_index("position")
    trigger = tiny_engram.to_tokens(PROMPT).shape[1] - 1
    assert rows.loc[trigger, "reached"] == "reads" and rows.loc[trigger, "shared"] == rows.loc[trigger, "slots"] == 8
    assert rows.loc[[trigger + d for d in (3, 6, 9)], "reached"].isin(["conv", "reads"]).all()
    moved = rows["write_change"] > 0
    assert moved[rows["reached"].isin(["reads", "conv"])].all()
    assert not moved[rows["reached"].isin(["later", "untouched"])].any()
    assert (rows.loc[rows["reached"] == "untouched", "kl"] == 0).all()
    later = rows[rows["reached"] == "later"]
    assert len(later) and (later["kl"] > 0).all()
    counted = report.table().set_index("reached")["positions"]
    assert counted.sum() == len(rows) and counted["reads"] == (rows["shared"] > 0).sum()


def test_corpus_ngrams_that_share_rows_are_counted_exactly(tiny_engram, edit, texts):
    report = edit_specificity(tiny_engram, edit.overlay, list(texts))
    expected = 0
    for text in texts:
        tokens, hit = tiny_engram.to_tokens(text), None
        for block, rows in edit.overlay.edits.items():
            ngram_hash = tiny_engram.engram(block).ngram_hash
            reads = ngram_hash.rows_of_slots(ngram_hash.slots(tokens))[0]
            here = torch.tensor([any(int(r) in rows.rows.tolist() for r in row) for row in reads])
            hit = here if hit is None else hit | here
        expected += int(hit.sum())
    assert report.ngrams()["occurrences"].sum() == expected > 0
    total = report.table()["positions"].sum()
    assert total == sum(tiny_engram.to_tokens(t).shape[1] for t in texts)
    assert report.table()["share"].sum() == pytest.approx(1.0)


def test_texts_that_read_no_edited_row_do_not_change(tiny_engram, edit):
    empty = Overlay({1: RowEdit(torch.tensor([0]), torch.full((1, 4), 9.0))}, edit.overlay.weights_sha256)
    texts = [t for t in ("The castle was old.", "A fox.", PROMPT) if 0 not in rows_read(tiny_engram, t)]
    assert texts
    for text in texts:
        tokens = tiny_engram.to_tokens(text)
        before = tiny_engram(tokens)
        with apply_overlay(tiny_engram, empty):
            assert torch.equal(tiny_engram(tokens), before)
    assert edit_specificity(tiny_engram, empty, texts).positions.empty


def rows_read(model, text: str) -> set[int]:
    ngram_hash = model.engram(1).ngram_hash
    return set(ngram_hash.rows_of_slots(ngram_hash.slots(model.to_tokens(text))).flatten().tolist())


def test_a_trigger_inside_the_prompt_takes_a_gradient(tiny_engram):
    with pytest.raises(ValueError, match="last token"):
        edit_slots(tiny_engram, PROMPT, TARGET, position=4)
    result = edit_slots(tiny_engram, PROMPT, TARGET, method="gradient", position=4, blocks=[1], steps=30)
    assert result.logprob_after > result.logprob_before + 0.1
    assert set(result.overlay.edits) == {1}


def test_overlays_are_saved_and_read_back_exactly(tiny_engram, edit, tmp_path):
    save_overlay(edit.overlay, tmp_path / "edit.safetensors")
    again = load_overlay(tmp_path / "edit.safetensors")
    assert again.about == edit.overlay.about and again.weights_sha256 == tiny_engram.identity.weights_sha256
    tokens = tiny_engram.to_tokens(PROMPT)
    with apply_overlay(tiny_engram, edit.overlay):
        expected = tiny_engram(tokens)
    with apply_overlay(tiny_engram, again):
        assert torch.equal(tiny_engram(tokens), expected)


def test_overlays_that_do_not_fit_are_refused(tiny_engram, edit, tmp_path):
    row = edit.overlay.edits[1]
    bad = {
        "made for weights": Overlay({1: row}, "0" * 64),
        "edits block 0": Overlay({0: row}, edit.overlay.weights_sha256),
        "ascending rows": Overlay({1: RowEdit(row.rows.flip(0), row.values)}, edit.overlay.weights_sha256),
        "finite values": Overlay({1: RowEdit(row.rows, row.values * np.nan)}, edit.overlay.weights_sha256),
    }
    for message, overlay in bad.items():
        with pytest.raises(OverlayError, match=message), apply_overlay(tiny_engram, overlay):
            pass
    file = tmp_path / "x.safetensors"
    with pytest.raises(OverlayError, match="no such file"):
        load_overlay(file)
    file.write_bytes(b"\x00" * 30)
    with pytest.raises(OverlayError, match="damaged"):
        load_overlay(file)
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, file)
    with pytest.raises(OverlayError, match="expected format"):
        load_overlay(file)


def test_bad_edits_name_what_was_expected(tiny_engram):
    with pytest.raises(ValueError, match="expected method"):
        edit_slots(tiny_engram, PROMPT, TARGET, method="magic")
    with pytest.raises(ValueError, match="expected a target"):
        edit_slots(tiny_engram, PROMPT, "")
    with pytest.raises(ValueError, match="position in"):
        edit_slots(tiny_engram, PROMPT, TARGET, position=99)
    with pytest.raises(ValueError, match="at least one text"):
        edit_specificity(tiny_engram, Overlay({}, tiny_engram.identity.weights_sha256), [])
