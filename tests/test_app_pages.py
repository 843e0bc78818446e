"""Does every page of the dashboard show what the library computes, in every state? In-process, without a browser."""

# ruff: noqa: F401, F811 - fixtures are imported and then named by tests
from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("streamlit", reason="the dashboard needs the extra `app`")

import engram_interp.gallery
from engram_interp.hooks import collect_memory_statistics
from engram_interp.models.registry import load
from engram_interp.probes.gates import read_gates
from engram_interp.probes.lens import logit_lens_kl
from engram_interp.probes.memory_table import lookup
from engram_interp.probes.token_effects import token_effects
from tests.app_session import TEXT, directories, finish_job, open_app, strip


def test_gates_page_draws_the_gates(open_app, directories):
    at = open_app()
    assert at.title[0].value == "When does the memory speak?"
    gates = read_gates(load(directories["tiny-engram"]), TEXT)
    data = strip(at)
    assert len(data["tokens"]) == len(gates.tokens)
    np.testing.assert_allclose(data["shown"], gates.gates[:, 0].mean(1), atol=1e-5)
    np.testing.assert_allclose(data["grid"][3], gates.gates[:, 1, 1], atol=1e-5)
    assert gates.provenance.models["tiny-engram"][:12] in data["caption"]
    change = token_effects(load(directories["tiny-engram"]), TEXT).change
    assert f"{change[3]:+.3f} nats" in data["hover"][3]
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


def test_long_text_is_shown_in_windows(open_app, monkeypatch, directories):
    open_app()
    import state

    monkeypatch.setattr(state, "WINDOW", 16)
    gates = read_gates(load(directories["tiny-engram"]), TEXT * 3)
    data = strip(open_app(text=TEXT * 3, window="2"))
    assert data["first"] == 16 and len(data["tokens"]) == 16
    np.testing.assert_allclose(data["shown"], gates.gates[16:32, 0].mean(1), atol=1e-5)


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
    assert table["KL, tiny-moe"].iloc[-1] == 0


def test_lens_comparison_is_a_job_with_a_statement(open_app):
    at = finish_job(open_app("lens", baseline="tiny-moe"))
    assert not at.error
    assert "without a null, nothing can be said" in at.warning[0].value and "one seed per arm" in at.warning[0].value
    assert len(at.get("plotly_chart")) == 4
    at = finish_job(open_app("lens", baseline="tiny-moe", lens_control="tiny-moe-2"))
    assert not at.error
    assert "what two seeds of tiny-moe differ by" in at.warning[0].value
    assert any("Null, tiny-moe minus tiny-moe-2" in m.value for m in at.markdown)


def test_similarity_is_a_job_that_refuses_without_a_control(open_app):
    at = finish_job(open_app("similarity"))
    assert not at.error, at.error
    assert "not supported" in at.warning[0].value
    assert any("no control" in caption.value for caption in at.caption)


def test_removing_the_write_is_closing_the_gate(open_app):
    zero, closed = (strip(open_app("ablate", kind=kind)) for kind in ("output_zero", "gate_closed"))
    np.testing.assert_allclose(zero["grid"][0][:-1], closed["grid"][0][:-1], atol=1e-5)
    assert zero["labels"][1].startswith("equal_norm_random")


def test_a_token_of_the_ablated_text_shows_what_would_follow(open_app, directories):
    at = open_app("ablate", kind="mean", where="3")
    at.session_state["ablated"] = {"selected": {"token": 4, "layer": -1}}
    at.run()
    assert strip(at)["selected"] == 4 and at.tabs[0].label == "After token 4"
    shown = next(f.value for f in at.dataframe if "p without" in f.value.columns)
    model = load(directories["tiny-engram"])
    fitted = collect_memory_statistics(model, [s.text for s in engram_interp.gallery.load_gallery()])
    effects = token_effects(model, TEXT, kind="mean", blocks=(3,), statistics=fitted)
    np.testing.assert_allclose(shown["p without"], effects.predictions(4)["p without"], atol=1e-5)


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
    rows = [(task, f"x{i}", 0.1 * i) for task in ("a", "b") for i in range(9)]
    frame = pd.DataFrame(
        [
            {"task": t, "condition": c, "full": 0.9, "full_low": 0.8, "full_high": 1.0}
            | {"score": v, "score_low": v - 0.1, "score_high": v + 0.1}
            for t, c, v in rows
        ]
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
    assert next(s for s in at.selectbox if s.label == "Estimate").options == ["score", "full"]
    conditions = next(m for m in at.multiselect if m.label.startswith("Conditions"))
    assert len(conditions.options) == 9 and len(json.loads(at.get("plotly_chart")[0].proto.spec)["data"]) == 8
    conditions.set_value(["x8"]).run()
    assert [bar["name"] for bar in json.loads(at.get("plotly_chart")[0].proto.spec)["data"]] == ["x8"]
    at.multiselect[0].set_value(["run-0", "run-1"]).run()
    assert not at.exception and at.get("plotly_chart")
    settings = next(f.value for f in at.dataframe if "setting" in f.value.columns)
    assert settings["setting"].tolist() == ["seed"]
