"""The report on random models: one page that needs nothing beside it, with the numbers of the run folder it lies in."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
import pytest

from engram_interp.figures.bars import Bars, bars_figure
from engram_interp.figures.curve import Curve, curve_figure
from engram_interp.figures.heatmap import heatmap_figure
from engram_interp.figures.static_svg import static_svg
from engram_interp.gallery import load_gallery
from engram_interp.models.registry import Pair
from engram_interp.runs.folder import open_run
from engram_interp.studies import report
from engram_interp.studies.report_page import Claim, Page

if TYPE_CHECKING:
    import plotly.graph_objects as go

SVG = "{http://www.w3.org/2000/svg}"


class Reader(HTMLParser):
    """Tags in order, and the addresses the page would ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.labels: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href") and value:
                self.addresses.append(value)
            if name == "aria-label":
                self.labels.append(value)


def body(page) -> str:
    """The page after its style."""
    text = page.read_text(encoding="utf-8")
    return text[text.index("<body>") :]


def reader_figures(page) -> int:
    """Figures of the page; each is drawn for a wide and for a narrow screen."""
    return body(page).count("<figure>")


@pytest.fixture(scope="module")
def made(tiny_engram, tiny_moe, tokenizer, tmp_path_factory):
    from tests.conftest import random_model

    other_seed = random_model(tokenizer, "tiny-control", routed_experts=12, memory=False, seed=21)
    sentences = load_gallery()
    own = [s for s in sentences if s.category == "figure-7"]
    control = [s for s in sentences if s.category == "control"]
    chosen = [*own, *(s for s in sentences if s.category not in ("control", "figure-7"))][:35] + control[:10]
    out = tmp_path_factory.mktemp("runs") / "report"
    patched = pytest.MonkeyPatch()
    patched.setattr(report, "load_gallery", lambda: tuple(chosen))
    page = report.run_report(Pair(tiny_engram, tiny_moe, other_seed), out, items=20, pictures=out.parent / "pictures")
    patched.undo()
    return page, out, chosen


@pytest.mark.slow
def test_the_page_needs_nothing_beside_it(made):
    page, _, _ = made
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    assert all(address.startswith("#") for address in reader.addresses), reader.addresses
    assert "script" not in reader.tags
    for anchor in reader.addresses:
        assert f'id="{anchor[1:]}"' in page.read_text()
    assert reader.tags.count("figure") == body(page).count("<svg xmlns") / 2
    assert all(label.strip() for label in reader.labels)


@pytest.mark.slow
def test_the_page_says_what_the_run_folder_holds(made):
    page, out, chosen = made
    text, run = page.read_text(encoding="utf-8"), open_run(out)
    assert run.manifest.status == "done"
    assert set(run.manifest.models) == {"tiny-engram", "tiny-moe", "tiny-control"}
    for verdict in run.table("findings")["verdict"]:
        assert f" {verdict}</span>" in text
    assert reader_figures(page) == 7 + 5 + len({s.category for s in chosen} - {"figure-7"})
    score = run.table("items.tiny-engram").query("task == 'phrase_entity'")["correct"].mean()
    assert f"{score:.3f} [" in text
    assert "trained for this project" not in text, "said of the bundled models only"


def test_text_of_a_claim_is_inert():
    page = Page("<b>title</b>", ["lead & more"])
    page.section("Section <1>", "a < b")
    page.claim(Claim("<script>alert(1)</script>", "p", "h", "n", "r", "opposite"))
    text = page.html()
    body = text[text.index("<body>") :]
    assert "<script>" not in body
    assert "&lt;script&gt;alert(1)" in body
    assert "✗ opposite" in body
    page.claim(Claim("c", "p", "h", "n", "r", "not decided (quick)"))
    assert "? not decided (quick)</span>" in page.html()
    assert re.search(r'<a href="#s1">Section &lt;1&gt;</a>', body)
    assert len(text) < 10_000, "a page without figures is small"


def parsed(figure: go.Figure, width: int = 720) -> ElementTree.Element:
    return ElementTree.fromstring(static_svg(figure, "what <it> shows", width=width))


def tips(figure: go.Figure) -> list[str]:
    return [e.text for e in parsed(figure).iter(f"{SVG}title")]


def test_bars_stand_on_zero_and_are_as_high_as_their_values():
    bars = [Bars("one", np.array([1.0, 2.0]), np.array([0.5, 1.0]), np.array([1.5, 3.0]))]
    bars.append(Bars("two", np.array([np.nan, 4.0]), np.array([np.nan, 3.0]), np.array([np.nan, 5.0])))
    figure = bars_figure(bars, ["a", "b"], title="t & u", y_title="y")
    boxes = [r for r in parsed(figure).iter(f"{SVG}rect") if r.find(f"{SVG}title") is not None]
    heights = [float(box.get("height")) for box in boxes]
    assert np.allclose(np.array(heights) / heights[0], [1, 2, 4], atol=0.01), "a missing value leaves a gap"
    assert len({float(box.get("y")) + float(box.get("height")) for box in boxes}) == 1
    assert tips(figure)[0] == "one, a: 1 [0.5, 1.5]"
    patterns = [{e.get("id") for e in parsed(figure, width).iter(f"{SVG}pattern")} for width in (350, 720)]
    assert patterns[0]
    assert not patterns[0] & patterns[1], "the hidden picture's pattern must not be taken for the shown one's"


@pytest.mark.parametrize("width", [720, 350])
def test_everything_lies_inside_the_picture(width):
    values = np.random.default_rng(0).random((7, 7))
    heat = heatmap_figure(
        values, range(7), range(7), title="t", row_title="r", column_title="c", curves={"n": np.arange(7.0)}
    )
    line = np.arange(7.0)
    curve = curve_figure(
        [Curve("x", line, line - 1, line + 1)], list(range(7)), title="t", x_title="x", y_title="y", zero=True
    )
    for figure in (heat, curve):
        root = parsed(figure, width)
        x1, y1 = map(float, root.get("viewBox").split()[2:])
        for element in root.iter(f"{SVG}text"):
            assert 0 <= float(element.get("x")) <= x1
            assert -20 <= float(element.get("y")) <= y1
    cells = [r for r in parsed(heat).iter(f"{SVG}rect") if r.find(f"{SVG}title") is not None]
    assert len(cells) == values.size
    assert tips(heat)[8] == f"row 1, column 1: {values[1, 1]:.3f}"


def test_a_picture_says_what_it_shows_and_refuses_what_it_cannot_draw():
    import plotly.graph_objects as go

    figure = go.Figure(go.Scatter(x=[0, 1], y=[0, 1], name="<b>"))
    assert parsed(figure).get("aria-label") == "what <it> shows"
    with pytest.raises(ValueError, match=r"found \['pie'\]"):
        static_svg(go.Figure(go.Pie(values=[1])), "a pie")


@pytest.mark.slow
def test_pictures_stand_alone_and_are_small(made):
    _, out, _ = made
    files = sorted((out.parent / "pictures").glob("*.svg"))
    assert [f.stem for f in files] == ["ablation", "cka", "gates", "lens"]
    for file in files:
        root = ElementTree.parse(file).getroot()
        assert root.get("aria-label").strip()
        assert any(r.get("width") == "100%" for r in root.iter(f"{SVG}rect")), "a ground of its own"
        assert file.stat().st_size < 150_000
