"""Does every page of the dashboard answer in its empty, long, loading and failing states? In-process, without a browser."""

# ruff: noqa: F401, F811 - fixtures are imported and then named by tests
from __future__ import annotations

import threading
import tomllib

import pytest

pytest.importorskip("streamlit", reason="the dashboard needs the extra `app`")

from engram_interp.figures.style import contrast
from engram_interp.models.adapters import opening
from engram_interp.probes.lens import logit_lens_kl
from tests.app_session import APP, TEXT, directories, finish_job, open_app, strip


def test_empty_text_and_too_long_text(open_app, monkeypatch):
    at = open_app(text="   ")
    assert "Type a text" in at.info[0].value and not at.get("bidi_component")
    import loaders
    import state

    monkeypatch.setattr(loaders, "MAX_TOKENS", 20)
    monkeypatch.setattr(state, "WINDOW", 10)
    at = open_app(text=TEXT * 3)
    assert "at most 20" in at.warning[0].value
    next(b for b in at.button if "Use the first 10" in b.label).click().run()
    assert not at.warning and 5 < len(strip(at)["tokens"]) <= 11


@pytest.mark.parametrize("page", [None, "ablate", "memory"])
def test_a_model_without_memory_is_explained(open_app, page):
    at = open_app(page, model="tiny-moe")
    assert "no Engram memory" in at.info[0].value
    assert not at.error and not at.get("bidi_component")


def test_a_failure_is_one_line_and_the_controls_stay(open_app, monkeypatch):
    def fail(*_: object, **__: object):
        raise RuntimeError("gate at token 3,\nlayer 1 is nan")

    monkeypatch.setattr("engram_interp.probes.gates.read_gates", fail)
    at = open_app(text="A text that nobody has read before.")
    assert at.error[0].value == "gate at token 3, layer 1 is nan"
    assert "RuntimeError" in at.code[0].value
    assert at.text_area and at.selectbox


def test_no_model_at_all(open_app, monkeypatch):
    open_app()
    import loaders

    monkeypatch.setattr(loaders, "model_choices", dict)
    at = open_app()
    assert at.title[0].value == "No model to look at" and "--model" in at.info[0].value


@pytest.mark.parametrize("name", ["/etc", "../../etc", "mini-missing"])
def test_the_address_opens_no_other_path(open_app, name):
    at = open_app(model=name)
    assert at.session_state["model"] in at.sidebar.selectbox[0].options


@pytest.mark.parametrize(
    ("page", "params"), [("lens", {"text": " "}), ("ablate", {"text": " "}), ("memory", {"phrase": " "})]
)
def test_a_page_without_text_asks_for_one(open_app, page, params):
    at = open_app(page, **params)
    assert at.info[0].value.startswith("Type a")
    keys = [chart.key for chart in at.get("plotly_chart")]
    assert not at.error and not at.get("bidi_component") and not {"figure_lens_tiny-engram", "figure_lookup"} & {*keys}


def test_long_texts_are_cut_where_all_of_it_cannot_be_shown(open_app, monkeypatch):
    open_app()
    import state

    monkeypatch.setattr(state, "WINDOW", 10)
    at = open_app("lens", text=TEXT * 3)
    assert any("its first 10 tokens" in c.value for c in at.caption)
    labels = next(s for s in at.selectbox if s.label.startswith("First choice")).options
    assert len(labels) == 10
    at = open_app("ablate", text=TEXT * 3)
    assert any("the first 10 are shown" in c.value for c in at.caption) and len(strip(at)["tokens"]) == 10
    at = open_app("memory", phrase=TEXT * 9)
    assert "at most 64 tokens" in at.warning[0].value


@pytest.mark.parametrize(
    ("page", "broken"),
    [
        ("lens", "engram_interp.probes.lens.logit_lens_kl"),
        ("ablate", "engram_interp.probes.token_effects.token_effects"),
        ("memory", "engram_interp.probes.memory_table.lookup"),
        ("runs", "engram_interp.runs.list_runs"),
    ],
)
def test_a_failure_leaves_every_page_usable(open_app, monkeypatch, page, broken):
    def fail(*_: object, **__: object):
        raise ValueError("expected\n  finite numbers")

    monkeypatch.setattr(broken, fail)
    at = open_app(page, text="A text that this page has never read.")
    assert at.error[0].value == "expected finite numbers" and "ValueError" in at.code[0].value
    assert at.title and at.sidebar.selectbox


def test_a_failed_job_is_one_line_and_can_be_started_again(open_app, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr("engram_interp.probes.similarity.cka_heatmap", lambda *_, **__: 1 / 0)
        at = finish_job(open_app("similarity", at="every token"))
        assert at.error[0].value == "division by zero" and "ZeroDivisionError" in at.code[0].value
    at = finish_job(open_app("similarity", at="every token"))
    assert not at.error and at.get("plotly_chart")


def test_a_job_shows_a_first_answer_and_keeps_it_when_stopped(open_app, monkeypatch):
    """The second half of the work waits, so that its state can be seen."""
    more = threading.Event()

    def slow(model, texts):
        if len(texts) == 9:
            assert more.wait(60)
        return logit_lens_kl(model, texts)

    open_app()
    import jobs

    monkeypatch.setattr(jobs, "LEAST_PART", 2)
    monkeypatch.setattr("engram_interp.probes.lens.logit_lens_kl", slow)
    at = open_app("lens", baseline="tiny-moe", show="entropy")
    at.button[0].click().run()
    job = jobs.find(at.query_params["job"][0] if isinstance(at.query_params["job"], list) else at.query_params["job"])
    for _ in range(200):
        if job.partial:
            break
        more.wait(0.05)
    at.run()
    assert any("So far, from 2 of 9 sentences" in c.value for c in at.caption)
    assert len(at.get("plotly_chart")) == 4
    next(b for b in at.button if b.label == "Cancel").click().run()
    more.set()
    for _ in range(200):
        if job.status != "running":
            break
        threading.Event().wait(0.05)
    at.run()
    assert job.status == "cancelled"
    assert "What follows is from 2 of 9 sentences alone" in at.info[0].value
    assert len(at.get("plotly_chart")) == 4


def test_a_model_is_opened_once_for_all_sessions(open_app, monkeypatch):
    import streamlit as st

    opened, real = [], opening.open_model
    monkeypatch.setattr(opening, "open_model", lambda path: opened.append(path.name) or real(path))
    st.cache_resource.clear()
    for text in (TEXT, "Another text.", TEXT):
        open_app(text=text)
        open_app("ablate", text=text)
    assert opened == ["tiny-engram"]


@pytest.mark.parametrize("name", ["light", "dark"])
def test_the_colours_of_the_theme_can_be_read(name):
    theme = tomllib.loads((APP / ".streamlit" / "config.toml").read_text())["theme"][name]
    page, second, text, primary = (
        theme[key] for key in ("backgroundColor", "secondaryBackgroundColor", "textColor", "primaryColor")
    )
    assert min(contrast(text, page), contrast(text, second)) >= 4.5
    assert min(contrast("#ffffff", primary), contrast(primary, page)) >= 4.3
