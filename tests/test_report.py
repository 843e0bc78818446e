"""The report on random models: one page that needs nothing beside it, with the numbers of the run folder it lies in."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from engram_interp.gallery import load_gallery
from engram_interp.models.registry import Pair
from engram_interp.runs.folder import open_run
from engram_interp.studies import report
from engram_interp.studies.report_page import Claim, Page


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
    """The page after the drawing library, which holds such tags as text."""
    text = page.read_text(encoding="utf-8")
    return text[text.index("<body>") :]


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
    page = report.run_report(Pair(tiny_engram, tiny_moe, other_seed), out, items=20)
    patched.undo()
    return page, out, chosen


@pytest.mark.slow
def test_the_page_needs_nothing_beside_it(made):
    page, _, _ = made
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    assert all(address.startswith("#") for address in reader.addresses), reader.addresses
    assert "<script>" in page.read_text()[:10_000]
    for anchor in reader.addresses:
        assert f'id="{anchor[1:]}"' in page.read_text()
    assert reader.tags.count("figure") == body(page).count("<svg xmlns") + 7
    assert all(label.strip() for label in reader.labels)


@pytest.mark.slow
def test_the_page_says_what_the_run_folder_holds(made):
    page, out, chosen = made
    text, run = page.read_text(encoding="utf-8"), open_run(out)
    assert run.manifest.status == "done"
    assert set(run.manifest.models) == {"tiny-engram", "tiny-moe", "tiny-control"}
    for verdict in run.table("findings")["verdict"]:
        assert f" {verdict}</span>" in text
    assert body(page).count("<svg xmlns") == 5 + len({s.category for s in chosen} - {"figure-7"})
    score = run.table("items.tiny-engram").query("task == 'phrase_entity'")["correct"].mean()
    assert f"{score:.4g}" in text
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
    assert re.search(r'<a href="#s1">Section &lt;1&gt;</a>', body)
    assert len(text) < 10_000, "the drawing library is left out where nothing is drawn"
