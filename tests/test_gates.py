"""Gates of one text and of a corpus: against the hooks, against plain recomputation, and on bad input."""

import json

import numpy as np
import pytest
import torch

from engram_interp.figures.strip import cividis, ink, strip_html, terminal_strips
from engram_interp.gallery import GallerySentence, Span
from engram_interp.memory.engram import rms_normalise
from engram_interp.models.text import show_tokens, windows
from engram_interp.probes.gate_statistics import record_gates
from engram_interp.probes.gates import read_gates


def test_gates_are_the_models_own_at_every_token_layer_and_branch(tiny_engram, texts):
    reading = read_gates(tiny_engram, texts[0])
    tokens = tiny_engram.to_tokens(texts[0])
    _, cache = tiny_engram.run_with_cache(tokens)
    assert reading.gates.shape == (tokens.shape[1], 2, 2)
    for e, block in enumerate(tiny_engram.engram_layers):
        np.testing.assert_array_equal(reading.gates[:, e], cache[f"blocks.{block}.engram.hook_gate"][0].numpy())
        write = cache[f"blocks.{block}.hook_engram_out"][0]
        np.testing.assert_allclose(reading.write_norm[:, e], write.flatten(1).norm(dim=1).numpy(), rtol=1e-6)
        hidden, key = cache[f"blocks.{block}.hook_resid_pre"], cache[f"blocks.{block}.engram.hook_key"]
        engram = tiny_engram.engram(block)
        query = rms_normalise(hidden, engram.query_norm, None)
        score = (query * rms_normalise(key, engram.key_norm, None)).sum(-1) / np.sqrt(tiny_engram.width)
        np.testing.assert_allclose(reading.scores[:, e], score[0].numpy(), atol=1e-6)


def test_a_long_text_is_read_in_windows_that_agree_with_their_own_forward(tiny_engram, texts):
    text = " ".join(texts) * 3
    ids = tiny_engram.tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) > 2 * tiny_engram.context
    reading = read_gates(tiny_engram, text)
    assert reading.token_ids.tolist() == [0, *ids]
    second = list(windows(tiny_engram, text))[1]
    _, cache = tiny_engram.run_with_cache(second.tokens, "blocks.1.engram.hook_gate")
    expected = cache["blocks.1.engram.hook_gate"][0, second.keep].numpy()
    np.testing.assert_array_equal(reading.gates[tiny_engram.context :][: len(expected), 0], expected)


def test_every_window_of_a_text_adds_tokens_and_none_twice(tiny_engram):
    for words in range(1, 2 * tiny_engram.context):
        text = " the" * words
        kept = [w.tokens[0, w.keep].tolist() for w in windows(tiny_engram, text)]
        assert all(kept), f"a window of {words} words adds nothing"
        assert [token for part in kept for token in part] == [
            0,
            *tiny_engram.tokenizer.encode(text, add_special_tokens=False).ids,
        ]


def test_table_and_json_hold_every_gate(tiny_engram, texts, tmp_path):
    reading = read_gates(tiny_engram, texts[0])
    table = reading.table()
    assert len(table) == reading.gates.size
    row = table[(table.position == 3) & (table.layer == 3) & (table.branch == 1)].iloc[0]
    assert row.gate == reading.gates[3, 1, 1]
    for suffix in (".json", ".csv", ".html"):
        reading.write(tmp_path / f"gates{suffix}")
    data = json.loads((tmp_path / "gates.json").read_text())
    np.testing.assert_array_equal(np.array(data["gates"], dtype=np.float32), reading.gates)
    assert data["layers"] == [1, 3]
    assert data["provenance"]["models"] == {"tiny-engram": tiny_engram.identity.weights_sha256}
    assert len((tmp_path / "gates.csv").read_text().splitlines()) == reading.gates.size + 1
    figure = json.loads(reading.figure().to_json())
    assert figure["data"][0]["zmin"] == 0
    assert figure["data"][0]["zmax"] == 1
    with pytest.raises(ValueError, match=r"\.html, \.csv, \.json.*gates\.png"):
        reading.write(tmp_path / "gates.png")


@pytest.mark.parametrize(("text", "message"), [("", "empty text"), ("word " * 9000, "at most 8192 tokens, found")])
def test_unreadable_texts_are_refused(tiny_engram, text, message):
    with pytest.raises(ValueError, match=message):
        read_gates(tiny_engram, text)


def test_a_model_without_memory_is_refused_by_name(tiny_moe):
    with pytest.raises(ValueError, match="'tiny-moe' has no memory"):
        read_gates(tiny_moe, "some text")


def test_a_gate_that_is_not_finite_is_named(fresh_engram):
    with torch.no_grad():
        fresh_engram.engram(3).query_norm[1, 0] = torch.nan
    with pytest.raises(ValueError, match="token 0, layer 3, branch 1 is nan"):
        read_gates(fresh_engram, "some text")


def test_markup_in_a_text_stays_inert():
    html = strip_html(["<script>", 'a"b'], np.array([0.1, 0.9]))
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "&quot;" in html


def test_strip_shows_every_layer_and_branch_and_its_ink_can_be_read():
    gates = np.linspace(0, 1, 12).reshape(3, 2, 2)
    strips = terminal_strips(["a", " b", "c"], [1, 5], gates)
    assert [label for label, _ in strips] == [f"block {b} · branch {m}" for b in (1, 5) for m in (0, 1)]
    assert all(line.plain == "a·bc" for _, line in strips)
    numbers = terminal_strips(["a", " b", "c"], [1, 5], gates, colour=False)
    assert numbers[3][1].plain == "a 0.27 ·b 0.64 c 1.00"
    for value in np.linspace(0, 1, 21):
        assert _contrast(cividis(value), ink(cividis(value))) >= 4.5


def _contrast(colour, other):
    def luminance(rgb):
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    first, second = sorted((luminance(colour), luminance(tuple(bytes.fromhex(other[1:])))))
    return (second + 0.05) / (first + 0.05)


def test_fragments_of_characters_are_shown_as_bytes(tokenizer):
    ids = tokenizer.encode("é中😀", add_special_tokens=False).ids
    shown = "".join(show_tokens(tokenizer, ids))
    assert "�" not in shown
    assert "<e4>" in shown or "<e4b8" in shown


@pytest.fixture(scope="module")
def sentences(texts):
    marked = []
    for i, text in enumerate(texts):
        words = text.split()
        name = " ".join(words[1:3])
        start = text.index(name)
        marked.append(GallerySentence(f"t{i}", text, "test", (Span(name, "entity", start, start + len(name)),)))
    return marked


def test_corpus_statistics_equal_a_plain_recomputation(tiny_engram, sentences):
    statistics = record_gates(tiny_engram, sentences, reference=[s.text for s in sentences])
    readings = [read_gates(tiny_engram, s.text).gates[1:] for s in sentences]
    every = np.concatenate(readings)
    assert statistics.tokens == len(every)
    for e in range(2):
        for m in range(2):
            summary = next(s for s in statistics.summaries if (s.layer, s.branch) == ((1, 3)[e], m))
            assert summary.mean.value == pytest.approx(np.mean([r[:, e, m].mean() for r in readings]), abs=1e-6)
            assert summary.quantiles["0.5"] == pytest.approx(np.quantile(every[:, e, m], 0.5), abs=0.02)
            strongest = max(c.gate for c in statistics.contexts if (c.layer, c.branch) == (summary.layer, m))
            assert strongest == every[:, e, m].max()
            gaps = []
            for sentence, gates in zip(sentences, readings, strict=True):
                offsets = tiny_engram.tokenizer.encode(sentence.text, add_special_tokens=False).offsets
                final = next(i for i, (_, end) in enumerate(offsets) if end >= sentence.spans[0].end)
                rest = np.delete(gates[:, e, m], final)
                gaps.append(gates[final, e, m] - rest.mean())
            assert summary.difference["entity-final"].value == pytest.approx(np.mean(gaps), abs=1e-6)


def test_counts_put_every_token_in_one_bin(tiny_engram, sentences):
    statistics = record_gates(tiny_engram, sentences[:3], reference=[sentences[0].text])
    bins = {name: e for name, e in statistics.summaries[0].by_count.items() if e.n or e.estimable}
    assert bins["0"].n >= 2, "the other two sentences hold n-grams the reference lacks"
    assert statistics.summaries[0].by_count["1"].n >= 1


def test_the_split_of_the_write_is_exact(tiny_engram, texts):
    statistics = record_gates(tiny_engram, texts[:3])
    for split in statistics.splits:
        gated = conv = total = tokens = 0.0
        for text in texts[:3]:
            _, cache = tiny_engram.run_with_cache(tiny_engram.to_tokens(text))
            u = cache[f"blocks.{split.layer}.engram.hook_gated_value"][0, 1:]
            c = cache[f"blocks.{split.layer}.engram.hook_conv_out"][0, 1:]
            gated, conv, tokens = gated + float(u.square().sum()), conv + float(c.square().sum()), tokens + len(u)
            total += float(cache[f"blocks.{split.layer}.hook_engram_out"][0, 1:].square().sum())
        assert split.gated_norm2 == pytest.approx(gated / tokens, rel=1e-5)
        assert split.conv_norm2 == pytest.approx(conv / tokens, rel=1e-5)
        whole = split.gated_norm2 + split.conv_norm2 + 2 * split.cosine * np.sqrt(split.gated_norm2 * split.conv_norm2)
        assert whole == pytest.approx(total / tokens, rel=1e-4)
        assert split.tap_offsets == (0, 3, 6, 9)
        assert sum(split.tap_shares) == pytest.approx(1)


def test_no_text_is_refused(tiny_engram):
    with pytest.raises(ValueError, match="at least one text"):
        record_gates(tiny_engram, [])
