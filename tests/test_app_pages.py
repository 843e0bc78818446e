"""Does every page of the dashboard show what the library computes, in every state? In-process, without a browser."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("streamlit", reason="the dashboard needs the extra `app`")

import engram_interp.gallery
from engram_interp.models.checkpoint import save_model
from engram_interp.models.registry import load
from engram_interp.probes.gates import read_gates
from engram_interp.probes.lens import logit_lens_kl
from engram_interp.probes.memory_table import lookup

APP = Path(__file__).resolve().parents[1] / "app"
TEXT = "By the way, Alexander the Great was a king of Macedon."
PAGES = ("lens", "similarity", "ablate", "memory", "runs")


@pytest.fixture(scope="module")
def directories(tmp_path_factory, tiny_engram, tiny_moe, tokenizer) -> dict[str, Path]:
    """Two checkpoints as a user has them."""
    root = tmp_path_factory.mktemp("models")
    for name, model in (("tiny-engram", tiny_engram), ("tiny-moe", tiny_moe)):
        save_model(model, tokenizer, root / name)
    return {name: root / name for name in ("tiny-engram", "tiny-moe")}


@pytest.fixture
def open_app(directories, monkeypatch, tmp_path):
    """Start the dashboard with the two checkpoints, a short gallery and a cache of its own."""
    import streamlit as st
    from streamlit.testing.v1 import AppTest

    sentences = [s for s in engram_interp.gallery.load_gallery() if any(x.kind == "entity" for x in s.spans)][:9]
    monkeypatch.setattr(engram_interp.gallery, "load_gallery", lambda: tuple(sentences))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.syspath_prepend(str(APP))
    models = [part for path in directories.values() for part in ("--model", str(path))]
    monkeypatch.setattr(sys, "argv", ["main.py", *models, "--runs", str(tmp_path)])
    st.cache_data.clear()

    def start(page: str | None = None, model: str = "tiny-engram", **params: str):
        at = AppTest.from_file(str(APP / "main.py"), default_timeout=120)
        for key, value in {"model": model, "text": TEXT, **params}.items():
            at.query_params[key] = value
        at.run()
        if page:
            at.switch_page(f"views/{page}.py").run()
        assert not at.exception, at.exception[0].message
        return at

    return start


def strip(at, number: int = 0) -> dict:
    """What the page sent to the strip."""
    return json.loads(at.get("bidi_component")[number].proto.json)


def finish_job(at, button: int = 0):
    """Click the start button and wait for the job to end."""
    assert at.button, [e.value for e in at.error] + [c.value for c in at.code]
    at.button[button].click().run()
    for _ in range(300):
        if not any("Cancel" in b.label for b in at.button):
            return at
        time.sleep(0.2)
        at.run()
    raise AssertionError("the job did not end")


def test_gates_page_draws_the_gates(open_app, directories):
    at = open_app()
    assert at.title[0].value == "When does the memory speak?"
    gates = read_gates(load(directories["tiny-engram"]), TEXT)
    data = strip(at)
    assert len(data["tokens"]) == len(gates.tokens)
    np.testing.assert_allclose(data["shown"], gates.gates[:, 0].mean(1), atol=1e-5)
    np.testing.assert_allclose(data["grid"][3], gates.gates[:, 1, 1], atol=1e-5)
    assert gates.provenance.models["tiny-engram"][:12] in data["caption"]
    assert any("commit" in caption.value for caption in at.caption)


@pytest.mark.parametrize(
    ("params", "quantity", "index"),
    [({"layer": "3", "branch": "1"}, "gates", 1), ({"by": "score", "branch": "max"}, "scores", 0)],
)
def test_gates_page_follows_its_address(open_app, directories, params, quantity, index):
    data = strip(open_app(**params))
    values = getattr(read_gates(load(directories["tiny-engram"]), TEXT), quantity)[:, index]
    expected = values[:, 1] if params["branch"] == "1" else values.max(1)
    np.testing.assert_allclose(data["shown"], expected, atol=1e-5)


def test_effect_colours_have_a_row_per_memory(open_app):
    data = strip(open_app(by="effect"))
    assert data["labels"] == ["all memories", "block 1 alone", "block 3 alone"]
    assert data["shown"][-1] is None  # the last token has no next token
    assert data["scale"]["low"] == -data["scale"]["high"]


def test_choosing_a_cell_shows_the_rows_of_that_token(open_app, directories):
    at = open_app()
    at.session_state["strip"] = {"selected": {"token": 4, "layer": 3}}
    at.run()
    assert at.subheader[0].value.startswith("Token 4 ")
    assert at.session_state["layer"] == "3" and strip(at)["selected"] == 4
    assert at.query_params["token"] in ("4", ["4"])
    shown = next(f.value for f in at.dataframe if "slot" in f.value.columns and "norm" in f.value.columns)
    table = lookup(load(directories["tiny-engram"]), TEXT, block=3).table()
    assert shown["slot"].tolist() == table[table["position"] == 4]["slot"].tolist()


def test_a_shared_address_restores_text_and_token(open_app):
    at = open_app(text="The Prince of Wales lives in London.", token="3", layer="3")
    assert at.text_area[0].value == "The Prince of Wales lives in London."
    assert at.subheader[0].value.startswith("Token 3 ") and strip(at)["layer"] == 3


def test_a_token_outside_the_text_is_ignored(open_app):
    for token in ("999", "-1", "x", "٣"):
        assert not open_app(token=token).error


def test_pinned_text_stands_above_with_a_difference(open_app):
    at = open_app(pin="By the road, Alexander the Great was a king of Macedon.")
    titles = [strip(at, i)["title"] for i in range(3)]
    assert titles == ["A (pinned)", "Difference", "B"]
    assert strip(at, 0)["scale"]["high"] == strip(at, 2)["scale"]["high"]


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


def test_long_text_is_shown_in_windows(open_app, monkeypatch, directories):
    open_app()
    import state

    monkeypatch.setattr(state, "WINDOW", 16)
    gates = read_gates(load(directories["tiny-engram"]), TEXT * 3)
    data = strip(open_app(text=TEXT * 3, window="2"))
    assert data["first"] == 16 and len(data["tokens"]) == 16
    np.testing.assert_allclose(data["shown"], gates.gates[16:32, 0].mean(1), atol=1e-5)


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


@pytest.mark.parametrize("name", ["/etc", "../../etc", "mini-missing"])
def test_the_address_opens_no_other_path(open_app, name):
    at = open_app(model=name)
    assert at.session_state["model"] in at.sidebar.selectbox[0].options


def test_long_texts_are_shared_by_their_hash(open_app):
    open_app()
    import texts

    long = "Zürich and Vienna. " * 500
    assert not texts.fits_address(long)
    assert texts.recall(texts.remember(long)) == long
    assert texts.recall("../" * 3) is None and texts.recall("0" * 32) is None


def test_lens_page_ends_in_zero_for_both_models(open_app, directories):
    at = open_app("lens", baseline="tiny-moe")
    specs = [json.loads(chart.proto.spec) for chart in at.get("plotly_chart")]
    assert len(specs) == 2
    for name, spec in zip(("tiny-engram", "tiny-moe"), specs, strict=True):
        result = logit_lens_kl(load(directories[name]), [TEXT])
        assert result.kl[-1].max() == 0
        assert spec["layout"]["title"]["text"] == name
    table = next(f.value for f in at.dataframe if "layer" in f.value.columns)
    assert table["tiny-moe: KL, nats"].iloc[-1] == 0


def test_lens_comparison_is_a_job_with_a_statement(open_app):
    at = finish_job(open_app("lens", baseline="tiny-moe"))
    assert not at.error
    assert "one seed per arm" in at.warning[0].value
    assert len(at.get("plotly_chart")) == 4


def test_similarity_is_a_job_that_refuses_without_a_control(open_app):
    at = finish_job(open_app("similarity"))
    assert not at.error, at.error
    assert "not supported" in at.warning[0].value
    assert any("no control" in caption.value for caption in at.caption)


def test_removing_the_write_is_closing_the_gate(open_app):
    zero, closed = (strip(open_app("ablate", kind=kind)) for kind in ("output_zero", "gate_closed"))
    np.testing.assert_allclose(zero["grid"][0][:-1], closed["grid"][0][:-1], atol=1e-5)
    assert zero["labels"][1].startswith("equal_norm_random")


def test_ablation_tasks_run_as_a_job(open_app, monkeypatch):
    monkeypatch.setattr("engram_interp.probes.tasks.GENERATED_TASKS", ("gallery_entity",))
    at = finish_job(open_app("ablate", items="20"))
    assert not at.error, at.error
    assert any("retained_above_chance" in f.value.columns for f in at.dataframe)


def test_memory_page_addresses_are_the_librarys(open_app, directories):
    at = open_app("memory", block="3", phrase="The Prince of Wales")
    table = lookup(load(directories["tiny-engram"]), "The Prince of Wales", block=3).table()
    shown = next(f.value for f in at.dataframe if "slot" in f.value.columns)
    assert shown["slot"].tolist() == table["slot"].tolist()
    at = finish_job(at)
    assert not at.error
    assert any("expected_colliding" in f.value.columns for f in at.dataframe)


def test_runs_page_lists_good_and_broken_runs(open_app, tmp_path):
    import pandas as pd

    from engram_interp.runs import start_run

    assert "Nothing to show" in open_app("runs").info[0].value
    frame = pd.DataFrame(
        {
            "task": ["a", "b"],
            "condition": ["x", "x"],
            "score": [0.5, 0.6],
            "score_low": [0.4, 0.5],
            "score_high": [0.6, 0.7],
        }
    )
    for seed in (0, 1):
        with start_run(
            tmp_path / f"run-{seed}",
            study="removal",
            config={"seed": seed, "kind": "zero"},
            seeds=[seed],
            models={"m": "0"},
            texts_sha256="0",
        ) as run:
            run.write_table("scores", frame)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "manifest.json").write_text("{")
    at = open_app("runs")
    assert not at.error
    assert "torn cannot be read" in at.warning[0].value
    at.multiselect[0].set_value(["run-0", "run-1"]).run()
    assert not at.exception and at.get("plotly_chart")
    settings = next(f.value for f in at.dataframe if "setting" in f.value.columns)
    assert settings["setting"].tolist() == ["seed"]


def test_no_model_at_all(open_app, monkeypatch):
    open_app()
    import loaders

    monkeypatch.setattr(loaders, "model_choices", dict)
    at = open_app()
    assert at.title[0].value == "No model to look at" and "--model" in at.info[0].value


@pytest.fixture
def jobs(open_app):
    """The module of jobs, as the application imports it."""
    open_app("runs")
    import jobs

    return jobs


def wait_for(job) -> None:
    deadline = time.monotonic() + 20
    while job.status == "running" and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_job_is_found_by_what_it_computes_and_can_be_cancelled(jobs):
    gate = threading.Event()

    def work(job):
        for _ in range(1000):
            job.tick()
            gate.wait(0.01)

    name = jobs.job_name("a", 1)
    job = jobs.start(name, "label", 1000, work)
    assert jobs.start(name, "label", 1000, work) is job and jobs.find(name) is job
    job.stop.set()
    wait_for(job)
    assert job.status == "cancelled" and 0 <= job.done < 1000
    assert jobs.start(name, "label", 1000, lambda _: 7) is not job


def test_a_failed_job_says_why_in_one_line(jobs):
    def work(_):
        raise ValueError("expected\n  four documents")

    job = jobs.start(jobs.job_name("b"), "label", 1, work)
    wait_for(job)
    assert (job.status, job.error) == ("failed", "expected four documents") and "ValueError" in job.details
    done = jobs.start(jobs.job_name("c"), "label", 1, lambda _: 7)
    wait_for(done)
    assert (done.status, done.result) == ("done", 7)
