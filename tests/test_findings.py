"""The findings table on random models: everything is asked, nothing is found, all of it is kept."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from engram_interp.gallery import load_gallery
from engram_interp.measure.statistics import Estimate
from engram_interp.models.registry import Pair
from engram_interp.probes.gate_statistics import GateStatistics, GateSummary
from engram_interp.runs import Provenance
from engram_interp.runs.folder import open_run
from engram_interp.studies import findings


@pytest.fixture(scope="module")
def pair(tiny_engram, tiny_moe, tokenizer):
    from tests.conftest import random_model

    control = random_model(tokenizer, "tiny-control", routed_experts=12, memory=False, seed=21)
    return Pair(tiny_engram, tiny_moe, control)


@pytest.fixture(scope="module")
def found(pair, tmp_path_factory):
    sentences = load_gallery()
    chosen = [*sentences[:30], *(s for s in sentences if s.category == "control")][:40]
    out = tmp_path_factory.mktemp("runs") / "findings"
    patched = pytest.MonkeyPatch()
    patched.setattr(findings, "load_gallery", lambda: chosen)
    result = findings.run_findings(pair, out, items=20)
    patched.undo()
    return result, out


def test_random_models_support_no_claim(found):
    verdicts = {row.claim: row.verdict for row in found[0].rows}
    assert len(verdicts) == 6
    assert "supported" not in verdicts.values(), verdicts


def test_the_run_folder_holds_the_table_and_what_it_was_read_from(found):
    result, out = found
    run = open_run(out)
    assert run.manifest.status == "done"
    assert set(run.manifest.models) == {"tiny-engram", "tiny-moe", "tiny-control"}
    assert run.table("findings")["verdict"].tolist() == [row.verdict for row in result.rows]
    assert len(run.table("cka")) == 25
    assert json.loads((out / "findings.json").read_text())[0]["rule"]


def _gates(first, second=None):
    both = [GateSummary(1, 0, e, {}, 0.0, {}, {"entity-final": e}, {}, e) for e in (first, second or first)]
    return GateStatistics(tuple(both), (), (), 0, 50, Provenance({}, "", 50, {}))


def test_the_gate_rule_is_corrected_for_the_number_of_gates():
    clear = Estimate(0.2, 0.15, 0.25, 0.025, 50)
    assert findings._gate_finding(_gates(clear), "entity-final", "a name").verdict == "supported"
    opposite = replace(clear, value=-0.2, low=-0.25, high=-0.15)
    assert findings._gate_finding(_gates(opposite), "entity-final", "a name").verdict == "opposite"
    barely = Estimate(0.053, 0.003, 0.103, 0.025, 50)
    assert barely.excludes(0)
    assert findings._gate_finding(_gates(barely), "entity-final", "a name").verdict == "not supported", (
        "one of two tests at 95 % is not 95 %"
    )


def test_a_quick_sample_holds_no_unmet_rule_against_a_claim():
    """Not excluding 0 on half of the sentences is no finding; an interval that excludes it is, and so are gates that disagree."""
    verdict = lambda *gaps: findings._gate_finding(_gates(*gaps), "entity-final", "a name", quick=True).verdict  # noqa: E731
    clear, barely = Estimate(0.2, 0.15, 0.25, 0.025, 50), Estimate(0.053, 0.003, 0.103, 0.025, 50)
    below = replace(clear, value=-0.2, low=-0.25, high=-0.15)
    assert verdict(clear) == "supported" and verdict(below) == "opposite"
    assert verdict(barely) == verdict(clear, barely) == "not decided (quick)"
    assert verdict(clear, below) == "not supported"


def test_every_rule_knows_the_quick_form(found):
    """The results of random models, judged as a quick sample: nothing is turned down."""
    result, nan = found[0], float("nan")
    lens, cka = findings._lens_finding(result.lens_null, result.lens, True), findings._cka_finding(result.cka, True)
    rows = [lens, cka, *findings._ablation_findings(result.ablation, True)]
    assert not {row.verdict for row in rows} & {"not supported", "refused"}
    unclear = SimpleNamespace(retained_above_chance=nan)
    assert [findings._selective_verdict(unclear, unclear, q) for q in (False, True)] == [
        "refused",
        "not decided (quick)",
    ]
