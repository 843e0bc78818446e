"""The CKA heat map of two models: rows, errors, result and file."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from engram_interp.figures.heatmap import heatmap_figure
from engram_interp.figures.style import (
    BLUE_ORANGE,
    CIVIDIS,
    OKABE_ITO,
    apply_style,
    category,
    colour_at,
    contrast,
    ink,
    scale,
    symmetric_limit,
    template,
)
from engram_interp.gallery import GallerySentence, Span
from engram_interp.measure.alignment import soft_alignment
from engram_interp.measure.cka import linear_cka
from engram_interp.models.protocol import Decoder
from engram_interp.probes.heatmap_file import from_heatmap_file
from engram_interp.probes.residual_rows import plan_rows, read_rows, tokenizer_hash
from engram_interp.probes.similarity import cka_heatmap

MARKS = {"Alexander the Great": 0, "Macedon": 0, "Prince of Wales": 1, "London": 1, "Seine": 3, "Paris": 3}


@pytest.fixture(scope="module")
def marked(texts):
    """Texts with the character spans of the names above; the other texts have none."""
    spans = [
        [(t.index(n), t.index(n) + len(n)) for n, i in MARKS.items() if i == number] for number, t in enumerate(texts)
    ]
    return list(zip(texts, spans, strict=True))


@pytest.fixture(scope="module")
def heat(tiny_engram, tiny_moe, texts):
    return cka_heatmap(tiny_engram, tiny_moe, texts, "all", permutations=20)


def test_every_cell_is_linear_cka_of_the_models_own_residuals(heat, tiny_engram, tiny_moe, texts):
    site_a, site_b, rows_a, rows_b, documents = 2, 3, [], [], []
    for number, text in enumerate(texts):
        tokens = tiny_moe.to_tokens(text)
        rows_a.append(tiny_moe.residuals(tokens)[site_a].mean(2)[0, 1:])  # streams averaged, start token left out
        rows_b.append(tiny_engram.residuals(tokens)[site_b].mean(2)[0, 1:])
        documents += [number] * (tokens.shape[1] - 1)
    expected = linear_cka(torch.cat(rows_a), torch.cat(rows_b), groups=documents)
    assert heat.values[site_a, site_b] == pytest.approx(expected.value, rel=1e-9)
    assert heat.matrix.low[site_a, site_b] == pytest.approx(expected.low, rel=1e-9)
    assert (heat.matrix.n, heat.matrix.documents) == (len(documents), len(texts))


def test_result_has_the_promised_json_shape(heat, tiny_moe):
    data = json.loads(json.dumps(heat.as_dict(), allow_nan=False))
    assert data["rows"] == data["columns"] == [0, 1, 2, 3, 4]
    assert np.array(data["cka"]).shape == np.array(data["low"]).shape == np.array(data["high"]).shape == (5, 5)
    assert data["n"] == heat.matrix.n
    assert data["soft_alignment"]["k"] == 5
    assert data["soft_alignment"]["engram"] == pytest.approx(soft_alignment(heat.values).tolist())
    assert len(data["soft_alignment"]["null"]) == len(data["profile_match"]) == 5
    assert {"baseline", "engram", "companions", "null_max"} <= set(data["diagnostics"])
    assert data["diagnostics"]["null_max"] == heat.matrix.null_max > 0
    assert data["provenance"]["models"]["tiny-moe"] == tiny_moe.identity.weights_sha256
    assert heat.best_probability.sum(0) == pytest.approx(np.ones(5))


def test_tables_and_figure(heat):
    cells, depths = heat.table(), heat.depths()
    assert len(cells) == 25
    row = cells[(cells.baseline == 1) & (cells.engram == 4)].iloc[0]
    assert (row.cka, row.low) == (heat.values[1, 4], heat.matrix.low[1, 4])
    assert depths.soft_alignment.tolist() == heat.evidence[0].index.tolist()
    figure = heat.figure()
    names = [trace.name for trace in figure.data]
    assert names == ["CKA", "same depth", "soft alignment, k = 5", "null: baseline itself", "profile match"]
    assert json.loads(figure.to_json())["data"][2]["y"] is not None
    assert "residual site" in figure.layout.xaxis.title.text
    assert figure.layout.xaxis.title.text.startswith("tiny-engram")


def test_without_control_nothing_is_claimed(heat):
    assert not any(claim.allowed for claim in heat.claims)
    assert any("no control" in w for w in heat.warnings)


def test_control_gives_two_seed_pairs_and_a_model_is_never_deeper_than_itself(tiny_engram, tiny_moe, texts):
    other = copy.deepcopy(tiny_moe)
    for parameter in other.parameters():
        parameter.copy_(parameter[torch.randperm(len(parameter), generator=torch.Generator().manual_seed(0))])
    found = cka_heatmap(tiny_moe, tiny_moe, texts, "one_per_document", control=other)
    assert len(found.evidence) == 2
    assert all(e.seed_null for e in found.evidence)
    assert np.diag(found.values) == pytest.approx(1, abs=1e-9)
    assert (found.matrix.low.diagonal() <= 1 + 1e-9).all()
    assert (found.matrix.high.diagonal() >= 1 - 1e-9).all()
    assert found.matrix.n == found.matrix.documents == len(texts)
    assert found.control.shape == (5, 5)
    for evidence, control in zip(found.evidence, (found.control, found.control.T), strict=True):
        np.testing.assert_allclose(
            evidence.null_index, soft_alignment(control), rtol=1e-9
        )  # NaN where noise is negative
    assert "deeper" not in {c.verdict for c in found.claims}


def test_entity_final_rows_are_the_tokens_that_complete_the_names(marked, tiny_engram):
    tokenizer, rng = tiny_engram.tokenizer, np.random.default_rng(0)
    plan = plan_rows(tokenizer, marked, "entity_final", max_rows=100, rng=rng)
    assert plan.rows == 6
    assert plan.documents.tolist() == [0, 0, 1, 1, 3, 3]
    for (text, spans), chosen in zip(marked, plan.tokens, strict=True):
        offsets = tokenizer.encode(text, add_special_tokens=False).offsets
        assert [offsets[t][0] < end <= offsets[t][1] for t, (_, end) in zip(chosen, sorted(spans), strict=True)] == [
            True
        ] * len(spans)
    rows = read_rows(tiny_engram, plan)
    expected = tiny_engram.residuals(tiny_engram.to_tokens(marked[1][0]))[4].mean(2)[0, 1 + plan.tokens[1][0]]
    torch.testing.assert_close(rows[4][2], expected)
    text = "The town of New York lies by the sea for many years."
    gallery = GallerySentence(
        "g001", text, "place", (Span("New York", "entity", 12, 20), Span("many years", "phrase", 41, 51))
    )
    assert plan_rows(tokenizer, [gallery], "entity_final", max_rows=9, rng=rng).rows == 1
    last = plan_rows(tokenizer, [marked[0], marked[2]], "one_per_document", max_rows=9, rng=rng)
    assert last.tokens[0] == plan.tokens[0][-1:]
    assert len(last.tokens[1]) == 1  # no entity: any one token
    assert 0 <= last.tokens[1][0] < last.lengths[1]


def test_entity_final_heatmap_end_to_end(marked, tiny_engram, tiny_moe):
    texts = [
        *marked,
        *((f"The {w} of New York.", [(len(w) + 8, len(w) + 16)]) for w in ("king", "sea", "town", "river")),
    ]
    found = cka_heatmap(tiny_engram, tiny_moe, texts)
    assert (found.matrix.n, found.matrix.documents, found.positions) == (10, 7, "entity_final")


def test_more_rows_than_allowed_are_thinned_equally_and_said_so(tiny_engram, tiny_moe, texts):
    found = cka_heatmap(tiny_engram, tiny_moe, texts, "all", max_rows=60)
    assert found.matrix.n == 60
    assert any("left out at random" in w for w in found.warnings)

    def draw(seed):
        rng = np.random.default_rng(seed)
        return plan_rows(tiny_moe.tokenizer, texts, "all", max_rows=60, rng=rng).tokens

    assert draw(0) == draw(0) != draw(1)
    assert {len(tokens) for tokens in draw(0)} == {5}


def test_equal_texts_are_one_document_and_models_without_start_token_lose_token_0(tiny_engram, texts):
    rng = np.random.default_rng(0)
    plan = plan_rows(tiny_engram.tokenizer, [texts[0], texts[1], texts[0]], "one_per_document", max_rows=9, rng=rng)
    assert plan.documents.tolist() == [0, 1, 0]
    full, skipped = (
        plan_rows(tiny_engram.tokenizer, texts, "all", max_rows=999, rng=rng, skip_first=s) for s in (False, True)
    )
    assert full.rows - skipped.rows == len(texts)
    assert all(0 not in tokens for tokens in skipped.tokens)


def test_clear_errors(tiny_engram, tiny_moe, texts, marked):
    with pytest.raises(ValueError, match="at least one non-empty text, found none in 0 texts"):
        cka_heatmap(tiny_engram, tiny_moe, [], "all")
    with pytest.raises(ValueError, match="at least one non-empty text, found none in 1 texts"):
        cka_heatmap(tiny_engram, tiny_moe, [""], "all")
    with pytest.raises(ValueError, match="texts with marked entities, found none"):
        cka_heatmap(tiny_engram, tiny_moe, texts)
    with pytest.raises(ValueError, match="at least 4 rows"):
        cka_heatmap(tiny_engram, tiny_moe, texts[:3], "one_per_document")
    with pytest.raises(ValueError, match="at least 4 documents, found 1"):
        cka_heatmap(tiny_engram, tiny_moe, texts[:1], "all")
    with pytest.raises(ValueError, match="k between 1 and the 5 residual sites of tiny-moe, found 6"):
        cka_heatmap(tiny_engram, tiny_moe, texts, "all", k=6)
    with pytest.raises(ValueError, match=r"expected spans inside a text of 3 characters, found \(1, 9\)"):
        cka_heatmap(tiny_engram, tiny_moe, [("abc", [(1, 9)])])


def test_different_tokenizers_are_refused(tiny_engram, tiny_moe, texts):
    from tokenizers import Tokenizer

    other = copy.deepcopy(tiny_moe)
    content = json.loads(tiny_moe.tokenizer.to_str())
    content["model"]["merges"].pop()
    other.tokenizer = Tokenizer.from_str(json.dumps(content))
    assert tokenizer_hash(Tokenizer.from_str(tiny_moe.tokenizer.to_str())) == tokenizer_hash(tiny_moe.tokenizer)
    with pytest.raises(ValueError, match="models with the same tokenizer, found tiny-engram"):
        cka_heatmap(tiny_engram, other, texts, "all")


def test_nan_activations_name_model_site_and_token(fresh_engram, tiny_moe, texts):
    with torch.no_grad():
        fresh_engram.blocks[2].ln1.w[0] = torch.nan
    with pytest.raises(ValueError, match="infinity in tiny-engram at residual site 3, text 0, token 0"):
        cka_heatmap(fresh_engram, tiny_moe, texts, "all")


def test_a_single_stream_needs_no_reduction_rule(tiny_engram):
    from engram_interp.probes.residual_rows import _reduced

    hidden = torch.randn(1, 3, 2, 32, generator=torch.Generator().manual_seed(0))
    assert isinstance(tiny_engram, Decoder)
    torch.testing.assert_close(_reduced(tiny_engram, hidden), hidden.mean(2))
    assert torch.equal(_reduced(tiny_engram, hidden[:, :, :1]), hidden[:, :, 0])


@pytest.mark.reference
def test_heatmap_file_of_figure_4b(shared, tmp_path):
    figures = json.loads((shared / "vectors" / "paper_figures.json").read_text())
    path = tmp_path / "heatmap.json"
    path.write_text(json.dumps({"cka": figures["fig4b_cka_moe_row_engram27B_col"]}))
    found = from_heatmap_file(path)
    assert np.abs(found.index - figures["fig4b_white_line_a_j"]).max() <= 0.2
    assert found.null is None
    assert any("no null" in w for w in found.warnings)
    assert found.as_dict()["soft_alignment"]["null"] is None


def test_heatmap_file_round_trip_and_errors(heat, tmp_path):
    path = tmp_path / "heatmap.json"
    path.write_text(json.dumps(heat.as_dict() | {"control": heat.values.T.tolist()}))
    found = from_heatmap_file(path, 3)
    assert found.index == pytest.approx(soft_alignment(heat.values, 3))
    assert found.null == pytest.approx(soft_alignment(heat.values.T, 3))
    assert len(found.table()) == 5
    assert [t.name for t in found.figure().data][-1] == "null"
    json.dumps(found.as_dict(), allow_nan=False)
    path.write_text("[[1, 0.5], [0.5, 1]]")
    assert from_heatmap_file(path, 1).index.tolist() == [0, 1]
    for content, message in (
        ("[[1, 0.5], [0.5, 1]]", "k between 1 and the 2 baseline layers, found 5"),
        ('{"values": 1}', r"the key 'cka', in heatmap.json, found \['values'\]"),
        ("[[1], [1, 2]]", "a rectangular list of numbers"),
        ("[1, 2]", "found 1 dimensions"),
        ("{", "expected JSON in heatmap.json"),
        ('{"cka": [[1, 0], [0, 1]], "rows": [1]}', "found 1 rows and 2 columns"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            from_heatmap_file(path)


def test_heatmap_figure_is_signed_only_when_something_is():
    values = np.array([[1.0, 0.2], [-0.05, 0.9]])
    options = {"title": "t", "row_title": "r", "column_title": "c"}
    trace = heatmap_figure(values, [0, 1], [0, 1], **options).data[0]
    assert (trace.zmin, trace.zmax, trace.colorscale[0][1]) == (0, 1, CIVIDIS[0])
    trace = heatmap_figure(values - 0.5, [0, 1], [0, 1], **options, theme="dark").data[0]
    assert trace.zmin == -trace.zmax
    assert trace.colorscale[0][1] == BLUE_ORANGE[0]
    with pytest.raises(ValueError, match="expected 1 x 2 values for the labels"):
        heatmap_figure(values, [0], [0, 1], **options)
    with pytest.raises(ValueError, match="expected 2 points, found 3 in curve 'a'"):
        heatmap_figure(values, [0, 1], [0, 1], curves={"a": np.zeros(3)}, **options)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_palettes_are_readable(theme):
    import plotly.graph_objects as go

    figure = apply_style(go.Figure(), title="title", theme=theme)
    layout = template(theme).layout
    assert figure.to_plotly_json()["layout"]["title"]["text"] == "title"
    assert contrast(layout.font.color, layout.paper_bgcolor) > 7
    assert contrast(layout.xaxis.linecolor, layout.plot_bgcolor) > 3
    for colour in [colour_at(v) for v in np.linspace(0, 1, 101)] + list(BLUE_ORANGE) + list(OKABE_ITO):
        assert contrast(ink(colour), colour) >= 4.5
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_scales_are_ordered_and_symmetric():
    brightness = [contrast(colour, "#000000") for colour in CIVIDIS]
    assert brightness == sorted(brightness)
    shade = [contrast(colour, "#000000") for colour in BLUE_ORANGE]
    assert shade[:5] == sorted(shade[:5])
    assert shade[4:] == sorted(shade[4:], reverse=True)
    assert shade[:4] == pytest.approx(shade[:4:-1], rel=0.2)
    assert [s[0] for s in scale("blue_orange")] == pytest.approx(np.linspace(0, 1, 9).tolist())
    assert (colour_at(0), colour_at(1), colour_at(7)) == (CIVIDIS[0], CIVIDIS[-1], CIVIDIS[-1])
    assert (symmetric_limit([-3, 2]), symmetric_limit([0.0])) == (3, 1)
    assert len({category(i) for i in range(7)}) == len({category(i)[1] for i in range(7)}) == 7
    with pytest.raises(ValueError, match="at most 7 series"):
        category(7)


@pytest.mark.parametrize("suffix", [".json", ".html", ".csv"])
def test_command_from_heatmap(tmp_path, capsys, suffix):
    from engram_interp.probes.cka_command import run_from_heatmap

    path, out = tmp_path / "heatmap.json", tmp_path / f"out{suffix}"
    path.write_text("[[1, 0.5], [0.5, 1]]")
    assert run_from_heatmap(path, 1, as_json=True, out=out) == 0
    assert json.loads(capsys.readouterr().out)["soft_alignment"] == {
        "k": 1, "engram": [0.0, 1.0], "null": None, "calibrated": None,
    }  # fmt: skip
    assert out.stat().st_size > 20
    run_from_heatmap(path, 2)
    assert "no null" in capsys.readouterr().out
    with pytest.raises(ValueError, match="to end in .json, .html or .csv"):
        run_from_heatmap(path, 1, out=tmp_path / "out.png")


def test_command_compares_two_models(monkeypatch, tiny_engram, tiny_moe, texts, tmp_path, capsys):
    from engram_interp.models.adapters import opening
    from engram_interp.probes.cka_command import run_cka

    monkeypatch.setattr(opening, "open_model", lambda name, **_: {"a": tiny_engram, "b": tiny_moe}[name])
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    assert run_cka("a", "b", texts=path, positions="all", permutations=0, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["models"] == {"engram": "tiny-engram", "baseline": "tiny-moe"}
    assert run_cka("a", "b", texts=path, permutations=0, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["positions"] == "one_per_document"
    with pytest.raises(ValueError, match="marks no entities"):
        run_cka("a", "b", texts=path, positions="entity_final")
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="found an empty file"):
        run_cka("a", "b", texts=path, positions="all")
