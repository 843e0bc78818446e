"""Training studies: strict variants, the right comparison, and a study that goes on where it was stopped."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from engram_interp.models.config import ModelConfig
from engram_interp.models.cost import active_flops, memory_parameters, parameter_count
from engram_interp.runs import open_run
from engram_interp.studies import training_study
from engram_interp.studies.commands import training_main as main
from engram_interp.studies.config import load_study_config
from engram_interp.studies.readme import collect_results
from engram_interp.studies.training_study import Variant, compare_runs, with_changes
from engram_interp.training.config import ConfigError, TrainConfig

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


@pytest.fixture
def study_file(training_run: TrainConfig, tmp_path: Path) -> Path:
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(json.loads(training_run.model_dump_json())))
    articles = tmp_path / "held_out.jsonl"
    texts = ["The river of the king is old. " * 9, "The harbour of Wales is old. " * 8, "The sea is old. " * 9]
    articles.write_text("".join(json.dumps({"title": str(i), "text": text}) + "\n" for i, text in enumerate(texts)))
    study = {
        "base": str(base), "tokens": 8 * 64, "held_out": str(articles), "articles": 3, "characters": 200,
        "variants": [
            {"name": "base"},
            {"name": "same"},
            {"name": "slow", "change": {"learning_rate": 1e-6, "model.engram.heads": 1}},
        ],
        "smoke": {"tokens": 64},
    }  # fmt: skip
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


def sweep():
    return importlib.import_module("experiments.sweep").STUDY


@pytest.fixture(autouse=True)
def checkout_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS.parent))


@pytest.mark.slow
def test_a_study_trains_compares_and_resumes(study_file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert main(sweep(), [str(study_file), "--seeds", "1", "--out", str(out)]) == 0
    assert main(sweep(), [str(study_file), "--seeds", "1", "2", "--out", str(out)]) == 0  # another seed, later
    assert "seed 1: best is " in capsys.readouterr().out
    run = open_run(out)
    runs = run.table("runs").set_index(["variant", "seed"])
    assert len(runs) == 6
    assert (runs.loc[["base", "same"], ["difference", "low", "high"]].to_numpy() == 0).all(), "equal runs are equal"
    assert (runs.loc["slow", "low"] > 0).all(), "a model that hardly moved is worse"
    assert (runs.loc["slow", "parameters"] < runs.loc["base", "parameters"]).all()
    assert (runs["trained_tokens"] == 512).all()
    assert (out / "figure.html").is_file()

    (out / "shards" / "articles" / "slow-s2.parquet").unlink()
    trained = []
    original = training_study._articles
    monkeypatch.setattr(
        training_study, "_articles", lambda plan, *rest: trained.append(plan.out.name) or original(plan, *rest)
    )
    assert main(sweep(), [str(study_file), "--seeds", "1", "2", "--out", str(out)]) == 0
    assert trained == ["slow-s2"], "only what is missing is made again"
    again = open_run(out).table("runs").set_index(["variant", "seed"])
    pd.testing.assert_frame_equal(again.drop(columns="minutes"), runs.drop(columns="minutes"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sweep", "allocation", "table_size", "placement", "components"])
def test_every_study_runs_at_the_size_of_seconds(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(EXPERIMENTS.parent)
    study = importlib.import_module(f"experiments.{name}").STUDY
    assert main(study, [f"experiments/configs/{name}.yaml", "--smoke", "--out", str(tmp_path / name)]) == 0
    assert "seed 0" in capsys.readouterr().out
    runs = open_run(tmp_path / name).table("runs")
    assert (runs["trained_tokens"] <= 4096).all()
    assert np.isfinite(runs[["nats_per_token", "difference", "low", "high"]].to_numpy()).all()
    assert "seed 0" in (tmp_path / name / "headline.txt").read_text()
    assert collect_results(tmp_path, tmp_path / "results") == [name]
    cost = json.loads((tmp_path / "results" / f"{name}.json").read_text())["training"]
    assert (cost["runs"], cost["tokens"]) == (len(runs), runs["trained_tokens"].sum())


def base_of(name: str):
    study = importlib.import_module(f"experiments.{name}").STUDY
    config = load_study_config(study.config, EXPERIMENTS / "configs" / f"{name}.yaml")
    config = config.model_copy(update={"base": EXPERIMENTS.parent / config.base, "smoke": {}})
    return study, config, training_study.load_train_config(config.base)


def models_of(name: str) -> dict[str, ModelConfig]:
    study, config, base = base_of(name)
    return {
        v.name: training_study.run_config(config, v, 0, Path("nowhere")).model for v in study.variants(config, base)
    }


def test_allocation_keeps_parameters_and_work():
    models = models_of("allocation")
    sizes = [parameter_count(m) for m in models.values()]
    assert max(sizes) / min(sizes) < 1.005
    assert len({active_flops(m).backbone for m in models.values()}) == 1
    assert models["ratio-1"].engram is None
    shares = [memory_parameters(m) / s for m, s in zip(models.values(), sizes, strict=True)]
    assert shares == sorted(shares)
    assert shares[-1] > 0.4


def test_placement_keeps_the_columns():
    models = models_of("placement")
    assert len(models) == 4 + 6
    columns = {m.engram.head_width * len(m.engram.blocks) for m in models.values()}
    assert len(columns) == 1


def test_components_keep_the_budget_of_rows():
    models = models_of("components")
    whole = memory_parameters(models["whole"])
    for name, model in models.items():
        assert memory_parameters(model) == pytest.approx(whole, rel=0.03), name  # projections grow with the orders


def test_slope_is_that_of_every_article():
    _, config, _ = base_of("table_size")
    rows = [
        {"variant": f"rows-x{m:g}", "seed": 0, "article": a, "loss": 100 * (4 - 0.05 * np.log10(m) + 0.1 * a), "tokens": 100}
        for m in config.multiples for a in range(5)
    ]  # fmt: skip
    found = importlib.import_module("experiments.table_size").slope(pd.DataFrame(rows), config.multiples)
    assert found.value == pytest.approx(-0.05)
    assert (found.low, found.high) == pytest.approx((-0.05, -0.05))


def test_differences_weigh_articles_by_their_bytes():
    rows = [
        {"variant": v, "seed": 0, "article": a, "loss": loss, "tokens": 10, "bytes": size, "parameters": 1,
         "memory_parameters": 0, "flops": 1, "trained_tokens": 1, "minutes": 0.0}
        for v, losses in (("one", (3.0, 8.0)), ("two", (2.0, 9.0)))
        for a, (loss, size) in enumerate(zip(losses, (30, 70), strict=True))
    ]  # fmt: skip
    table = compare_runs(pd.DataFrame(rows), "one").set_index("variant")
    assert table.loc["two", "bits_per_byte"] == pytest.approx(11 / np.log(2) / 100)
    assert table.loc["two", "difference"] == pytest.approx(
        table.loc["two", "bits_per_byte"] - table.loc["one", "bits_per_byte"], abs=1e-12
    )


def test_a_variant_that_does_not_fit_is_named_before_anything_is_trained(study_file, tmp_path, capsys):
    raw = yaml.safe_load(study_file.read_text())
    for change, words in (
        ({"model.engram.tables": 3}, "no key 'model.engram.tables'"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"model.width": "wide"}, "model.width"),
    ):
        raw["variants"][-1]["change"] = change
        study_file.write_text(yaml.safe_dump(raw))
        assert main(sweep(), [str(study_file), "--out", str(tmp_path / "run")]) == 2
        message = capsys.readouterr().err
        assert words in message
        assert "slow" in message
        assert not (tmp_path / "run").exists()


def test_changes_reach_nested_keys(training_run):
    changed = with_changes(training_run, {"model.engram.heads": 5, "batch": 2}, "here")
    assert (changed.model.engram.heads, changed.batch) == (5, 2)
    with pytest.raises(ConfigError, match="here"):
        with_changes(training_run, {"model.engram.heads": 0}, "here")
    with pytest.raises(ValueError, match="String should match pattern"):
        Variant(name="../up")


def test_the_bundled_sweep_fits_its_base():
    config = load_study_config(sweep().config, EXPERIMENTS / "configs" / "sweep.yaml")
    sizes = {}
    for variant in config.variants:
        local = config.model_copy(update={"base": EXPERIMENTS.parent / config.base, "smoke": {}})
        plan = training_study.run_config(local, variant, 0, Path("nowhere"))
        sizes[variant.name] = training_study.parameter_count(plan.model)
    for name in ("quarter-table", "whole-table"):
        assert abs(sizes[name] / sizes["bundled"] - 1) < 0.01, "table against experts at equal size"
