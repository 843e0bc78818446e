"""Do the paper's mechanistic findings appear in this pair? One table: the paper's claim, ours with intervals, the verdict.

Each claim has a rule, stated beside the verdict, that says what would count; the rule looks at the interval *and* at the null:
what the baseline shows against its own other seed. "supported" speaks of these checkpoints only, since there is one seed per arm.
On part of the sentences (`quick`) intervals are wider than the rules were made for: what an interval excludes there is said, and a rule
that is not met is "not decided (quick)", never "not supported".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import stats

from engram_interp.gallery import GallerySentence, load_gallery
from engram_interp.hooks.statistics import collect_memory_statistics
from engram_interp.measure.statistics import Estimate
from engram_interp.models.registry import Pair
from engram_interp.probes.ablation import AblationEffects, ablation_effects, default_conditions
from engram_interp.probes.gate_statistics import GateStatistics, record_gates
from engram_interp.probes.lens import logit_lens_kl
from engram_interp.probes.lens_comparison import LensComparison, compare_lens, earlier_beyond_null
from engram_interp.probes.similarity import CKAHeatmap, cka_heatmap
from engram_interp.probes.tasks import load_tasks
from engram_interp.runs import texts_hash
from engram_interp.runs.folder import RunFolder, start_run

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["supported", "not supported", "opposite", "refused", "not decided (quick)"]


@dataclass(frozen=True)
class Finding:
    """One claim. `paper`, `here`, `null`: what was seen, in words and numbers; `rule`: what decides."""

    claim: str
    paper: str
    here: str
    null: str
    rule: str
    verdict: Verdict


@dataclass(frozen=True, eq=False)
class Findings:
    """The table, and the results it was read from."""

    rows: tuple[Finding, ...]
    gates: GateStatistics = field(repr=False)
    lens: LensComparison = field(repr=False)
    lens_null: LensComparison = field(repr=False)
    cka: CKAHeatmap = field(repr=False)
    ablation: AblationEffects = field(repr=False)

    def table(self) -> pd.DataFrame:
        """One row per claim."""
        import pandas as pd

        return pd.DataFrame([vars(row) for row in self.rows])


def find(
    pair: Pair,
    sentences: Sequence[GallerySentence] | None = None,
    *,
    items: int = 400,
    permutations: int = 60,
    seed: int = 0,
    quick: bool = False,
) -> Findings:
    """Ask every question of the paper's section 6 of a pair, on the gallery and generated tasks.

    Args: items: per ablation task; permutations: of the null of the similarity's size; quick: the sizes are too
        small to hold a rule that is not met against a claim.
    """
    sentences = list(sentences or load_gallery())
    gates = record_gates(pair.engram, sentences)
    readings = [logit_lens_kl(model, sentences) for model in (pair.engram, pair.moe, pair.moe_control)]
    lens, lens_null = compare_lens(readings[0], readings[1]), compare_lens(readings[1], readings[2])
    cka = cka_heatmap(pair.engram, pair.moe, sentences, control=pair.moe_control, permutations=permutations, seed=seed)
    fit = [s.text for s in sentences if s.category == "control"] or [s.text for s in sentences]
    statistics = collect_memory_statistics(pair.engram, fit, seed=seed)  # sentences without entities are not scored
    names = ("gallery_entity", "gallery_phrase", "induction")
    tasks = load_tasks(names, pair.engram.tokenizer, limit=items, seed=seed)
    ablation = ablation_effects(pair.engram, tasks, default_conditions(pair.engram), statistics=statistics, seed=seed)
    rows = (
        _gate_finding(gates, "entity-final", "a name", quick),
        _gate_finding(gates, "phrase-final", "a set phrase", quick),
        _lens_finding(lens, lens_null, quick),
        _cka_finding(cka, quick),
        *_ablation_findings(ablation, quick),
    )
    return Findings(rows, gates, lens, lens_null, cka, ablation)


def _unmet(quick: bool, verdict: Verdict = "not supported") -> Verdict:
    """What is said when a rule is not met and a larger sample could meet it."""
    return "not decided (quick)" if quick else verdict


def _gate_finding(gates: GateStatistics, stratum: str, what: str, quick: bool = False) -> Finding:
    tests = len(gates.summaries)
    gaps = [(s.layer, s.branch, _at_level(s.difference[stratum], 1 - 0.05 / tests)) for s in gates.summaries]
    up = sum(gap.low > 0 for _, _, gap in gaps)
    down = sum(gap.high < 0 for _, _, gap in gaps)
    verdict: Verdict = (
        "supported" if up == tests else "opposite" if down == tests else _unmet(quick and not (up and down))
    )
    return Finding(
        f"The gate opens at the last token of {what}",
        "section 6.5: shown on chosen sentences and gates, no statistics",
        "; ".join(f"block {layer} branch {branch} {gap}" for layer, branch, gap in gaps),
        f"0: gate at the last token of {what} minus the gate in the rest of the sentence",
        f"every one of the {tests} intervals (together 95 %) lies above 0; opposite if every one lies below",
        verdict,  # gates on both sides of 0 decide: no larger sample brings them together
    )


def _at_level(estimate: Estimate, level: float) -> Estimate:
    """The same estimate with another confidence level."""
    if not estimate.estimable:
        return estimate
    half = float(stats.t.ppf((1 + level) / 2, estimate.n - 1)) * estimate.se
    return Estimate(
        estimate.value, estimate.value - half, estimate.value + half, estimate.se, estimate.n, level, estimate.rows
    )


def _lens_finding(lens: LensComparison, null: LensComparison, quick: bool) -> Finding:
    here, seeds = lens.overall.auc, null.overall.auc
    verdicts: dict[str, Verdict] = {"earlier": "supported", "later": "opposite", "undecided": _unmet(quick)}
    band = lens.overall.difference
    earlier = [layer for layer in lens.layers[:-1] if band.high[layer] < 0]
    return Finding(
        "Predictions form earlier with the memory: KL(final || layer) is smaller",
        "section 6.1.1, figure 4a: smaller at layers 1-17 of 30, not beyond; no interval, no second seed",
        f"area over layers {here} nats x layers; below 0 at layers {earlier} of {lens.layers} (simultaneous band)",
        f"the baseline against its other seed: {seeds}",
        "the interval of the area lies beyond everything in the interval of the null; " + lens.statement,
        verdicts[earlier_beyond_null(lens, null)],
    )


def _cka_finding(cka: CKAHeatmap, quick: bool) -> Finding:
    allowed = [c for c in cka.claims if c.allowed]
    deeper = [c.layer for c in allowed if c.verdict == "deeper"]
    first = cka.evidence[0]
    return Finding(
        "Layers of the Engram model resemble deeper layers of the baseline (soft alignment a_j > j)",
        "section 6.1.2, figure 4b: a_5 = 12.2 of 30 layers; no null",
        f"a_j (k = {first.k}) {_numbers(first.index)}; profile match {_numbers(first.depth)}",
        f"baseline against its other seed, a_j {_numbers(first.null_index)}",
        "at more than half of the layers the shift beyond the null excludes 0, simultaneously over layers and in every "
        f"seed pair; it does at layers {deeper}",
        "supported" if len(deeper) > len(cka.columns) / 2 else _unmet(quick, "not supported" if allowed else "refused"),
    )


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{v:.1f}" for v in values)


def _ablation_findings(ablation: AblationEffects, quick: bool) -> list[Finding]:
    table = ablation.table()
    joint = table[~table["condition"].str.contains("@ block")]
    rows: list[Any] = list(joint.itertuples())  # named tuples with the fields of the table
    drop = {(r.task, r.condition): r for r in rows}
    entity, induction = drop["gallery_entity", "output_zero"], drop["induction", "output_zero"]
    content = [drop["gallery_entity", c] for c in ("hash_permute", "equal_norm_random", "mlp_zero")]
    return [
        Finding(
            "Removing the memory hurts what is stored more than what is in the prompt",
            "section 6.3, figure 6: 29-44 % of factual scores kept, 81-93 % of reading",
            f"change of log p, output zeroed: entity completion {_change(entity)}, induction {_change(induction)}; "
            f"kept above chance {_kept(entity)} and {_kept(induction)}",
            "0 for a memory that does nothing",
            "entities lose more, and the intervals do not overlap; refused when either score cannot be told from chance, "
            "since an ability that is not there cannot be spared",
            _selective_verdict(entity, induction, quick),
        ),
        Finding(
            "It is the content of the rows that counts",
            "not tested in the paper",
            "; ".join(f"{r.condition} {_change(r)}" for r in (entity, *content)),
            "controls of equal size: another direction of the same norm, as much of the same block's experts",
            "the same rows at other addresses (hash_permute) hurt entity completion, and more than the matched experts do",
            "supported" if content[0].change_logprob_high < min(0, content[2].change_logprob_low) else _unmet(quick),
        ),
    ]


def _selective_verdict(stored, prompted, quick: bool) -> Verdict:  # noqa: ANN001
    if np.isnan(stored.retained_above_chance) or np.isnan(prompted.retained_above_chance):
        return _unmet(quick, "refused")
    return "supported" if stored.change_logprob_high < min(0, prompted.change_logprob_low) else _unmet(quick)


def _change(row) -> str:  # noqa: ANN001
    return f"{row.change_logprob:.2f} [{row.change_logprob_low:.2f}, {row.change_logprob_high:.2f}] nats"


def _kept(row) -> str:  # noqa: ANN001
    if np.isnan(row.retained_above_chance):
        return "not estimable"
    return (
        f"{row.retained_above_chance:.0%} [{row.retained_above_chance_low:.0%}, {row.retained_above_chance_high:.0%}]"
    )


def run_findings(pair: Pair, out: Path, *, items: int = 400, seed: int = 0) -> Findings:
    """Make the findings of a pair and keep them, with all they were read from, as a run folder.

    Raises: RunError when the folder holds something else.
    """
    sentences = load_gallery()
    models = {m.identity.name: m.identity.weights_sha256 for m in (pair.engram, pair.moe, pair.moe_control)}
    texts = texts_hash(s.text for s in sentences)
    with start_run(
        out, study="findings", config={"items": items}, seeds=[seed], models=models, texts_sha256=texts
    ) as folder:
        found = find(pair, sentences, items=items, seed=seed)
        write_findings(folder, found)
    return found


def write_findings(folder: RunFolder, found: Findings) -> None:
    """Put the table of findings, and all it was read from, into a run."""
    tables = {
        "findings": found.table(),
        "gates": found.gates.table(),
        "lens": found.lens.table(),
        "lens_null": found.lens_null.table(),
        "cka": found.cka.table(),
        "depths": found.cka.depths(),
        "ablation": found.ablation.table(),
    }
    for name, frame in tables.items():
        folder.write_table(name, frame)
    folder.write_text("findings.json", json.dumps([vars(row) for row in found.rows], indent=1))
