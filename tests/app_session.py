"""In-process sessions of the dashboard for its tests: three small checkpoints, a short gallery, a cache of their own."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

import engram_interp.gallery
from engram_interp.models.checkpoint import save_model
from tests.conftest import random_model

APP = Path(__file__).resolve().parents[1] / "app"
TEXT = "By the way, Alexander the Great was a king of Macedon."


@pytest.fixture(scope="module")
def directories(tmp_path_factory, tiny_engram, tiny_moe, tokenizer) -> dict[str, Path]:
    """Three checkpoints as a user has them; the last is another seed of the second."""
    root = tmp_path_factory.mktemp("models")
    seed = random_model(tokenizer, "tiny-moe-2", routed_experts=12, memory=False, seed=21)
    models = {"tiny-engram": tiny_engram, "tiny-moe": tiny_moe, "tiny-moe-2": seed}
    for name, model in models.items():
        save_model(model, tokenizer, root / name)
    return {name: root / name for name in models}


@pytest.fixture
def open_app(directories, monkeypatch, tmp_path):
    """Start the dashboard with these checkpoints, a short gallery and a cache of its own."""
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
