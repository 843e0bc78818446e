"""What breaks without the memory, and is it the memory's content?

Every way of removing it, jointly and block by block, on every task family, beside controls of the same size. Compare
`output_zero` (what the paper did) with `equal_norm_random` (the same shock without content), `hash_permute` (the same
rows elsewhere), `optimal` (the least any constant can cost) and `mlp_zero` (another part of the block, as much of it).
`families` pools the tasks that ask for one ability, with the published numbers of its benchmarks and the score of a
baseline that never had a memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
from pydantic import Field

from engram_interp.measure.statistics import mean_interval
from engram_interp.models.registry import load
from engram_interp.probes.ablation import Condition, default_conditions, full_scores, retention_figure
from engram_interp.probes.tasks import Task
from engram_interp.studies import Context, Plan, Report, Study, StudyConfig, main
from engram_interp.studies.ablation import (
    ablation_plan,
    effects_table,
    first_seed,
    headline,
    interaction_table,
    known_kinds,
    shown,
    task_shards,
)
from engram_interp.studies.texts import study_tasks

TABLES = ("items", "baseline", "effects", "families", "interaction", "published")
PAPER = "published (its own benchmarks)"

# arXiv 2601.07372, figure 6 (retained, raw) and table 1 (full score), in percent; chance by the number of answers.
# None: figure 6 does not say which CruxEval, and BBH mixes numbers of answers.
PUBLISHED = (
    ("C3", "reading", 93, 63.6, 26), ("RACE-Middle", "reading", 89, 82.8, 25), ("RACE-High", "reading", 84, 78.2, 25),
    ("DROP", "reading", 81, 59.0, 0),
    ("HellaSwag", "commonsense", 85, 72.7, 25), ("ARC-Challenge", "commonsense", 81, 73.8, 25),
    ("PIQA", "commonsense", 81, 73.5, 50),
    ("CMMLU", "knowledge", 78, 61.9, 25), ("MMLU", "knowledge", 75, 60.4, 25), ("MMLU-Pro", "knowledge", 72, 30.1, 10),
    ("CruxEval", "code", 76, None, 0), ("MBPP", "code", 68, 48.2, 0), ("HumanEval", "code", 58, 40.8, 0),
    ("BBH", "arithmetic", 67, 55.9, None), ("GSM8K", "arithmetic", 62, 60.6, 0), ("MGSM", "arithmetic", 44, 49.4, 0),
    ("MATH", "arithmetic", 36, 30.7, 0),
    ("TriviaQA-ZH", "facts", 44, 76.3, 0), ("PopQA", "facts", 44, 19.4, 0), ("TriviaQA", "facts", 29, 50.7, 0),
)  # fmt: skip


class Config(StudyConfig):
    """`kinds` are ablated on all memories together and on each alone; `baseline` scores the same items as it is."""

    kinds: tuple[str, ...] = Field(min_length=1)
    baseline: str | None = None


def conditions(context: Context) -> list[Condition]:
    """Every kind, jointly and per block."""
    return default_conditions(context.model, known_kinds(context.config.kinds))


def plan(context: Context) -> Plan:
    """Pieces of every task under every condition, then the same pieces on the baseline."""
    config, ablations = context.config, ablation_plan(context, conditions(context))
    if config.baseline is None:
        return ablations
    baseline = load(config.baseline)
    if baseline.tokenizer.to_str() != context.model.tokenizer.to_str():
        raise ValueError(f"expected a baseline with the model's tokenizer, found another in {config.baseline!r}")

    def score(task: Task, seed: int) -> dict[str, pd.DataFrame]:
        return {"baseline": full_scores(baseline, task, batch_tokens=config.batch_tokens).assign(seed=seed)}

    tasks = {seed: study_tasks(config, context.model, seed) for seed in config.seeds}
    shards = ablations.shards + task_shards("baseline", tasks, score)
    return replace(ablations, shards=shards, models={baseline.identity.name: baseline.identity.weights_sha256})


def published() -> pd.DataFrame:
    """The paper's retained fractions, raw as printed and corrected for chance; NaN where that cannot be known."""
    rows = []
    for name, family, percent, full, chance in PUBLISHED:
        kept = percent / 100
        known = full is not None and chance is not None
        above = (kept * full - chance) / (full - chance) if known else kept if chance == 0 else np.nan
        rows.append((name, family, kept, above, full, chance))
    columns = ["benchmark", "family", "retained", "retained_above_chance", "full", "chance"]
    return pd.DataFrame(rows, columns=columns).astype({"full": float, "chance": float})


def families(items: pd.DataFrame, baseline: pd.DataFrame | None) -> pd.DataFrame:
    """Effects per family, with the baseline's score and the lowest and highest number the paper prints for it."""
    table = effects_table(items, by="family")
    of_paper = published().groupby("family")
    for name in ("retained", "retained_above_chance"):
        low, high = of_paper[name].min(), of_paper[name].max()
        table[f"published_{name}_low"], table[f"published_{name}_high"] = (table["family"].map(x) for x in (low, high))
    if baseline is None:
        return table
    own = {key: _score(frame) for key, frame in baseline.groupby(["seed", "family"], sort=False)}
    scores = [own[seed, family] for seed, family in zip(table["seed"], table["family"], strict=True)]
    return table.join(pd.DataFrame(scores, index=table.index))


def _score(frame: pd.DataFrame) -> dict[str, float]:
    score = mean_interval(frame["correct"].to_numpy(dtype=float), frame["group"].to_numpy(dtype=str))
    return {"baseline_score": score.value, "baseline_score_low": score.low, "baseline_score_high": score.high}


def report(context: Context, frames: Mapping[str, pd.DataFrame]) -> Report:
    """Effects with intervals, by task and by family, interaction of the blocks, and the paper's numbers beside them."""
    effects, joint = effects_table(frames["items"]), [c.label for c in conditions(context) if c.blocks is None]
    by_family = families(frames["items"], frames.get("baseline"))
    tables = {"effects": effects, "families": by_family, "published": published()}
    tables["interaction"] = interaction_table(frames["items"], conditions(context))
    paper = _paper_rows()
    beside = pd.concat([first_seed(by_family)[paper.columns], paper], ignore_index=True).rename(
        columns={"family": "task"}
    )
    lines = (*headline(by_family, joint, by="family"), *_comparison(first_seed(by_family)))
    return Report(tables, retention_figure(beside, [*joint, PAPER]), lines)


def _paper_rows() -> pd.DataFrame:
    """The paper's numbers as one more condition: mean of its benchmarks, lowest and highest as whiskers."""
    grouped = (
        published().groupby("family", sort=False)["retained_above_chance"].agg(["mean", "min", "max"]).reset_index()
    )
    names = {"mean": "retained_above_chance", "min": "retained_above_chance_low", "max": "retained_above_chance_high"}
    return grouped.rename(columns=names).assign(condition=PAPER)


def _comparison(table: pd.DataFrame) -> list[str]:
    """One line per family: full score, the baseline's, and what the paper says is retained."""
    lines = []
    for family, rows in table.groupby("family", sort=False):
        row = rows.iloc[0]
        paper = (
            f"published retained {row['published_retained_low']:.2f} to {row['published_retained_high']:.2f}"
            if np.isfinite(row["published_retained_low"])
            else "nothing published"
        )
        baseline = f"baseline {shown(row, 'baseline_score')} " if "baseline_score" in row else ""
        lines.append(f"{family:18} full {shown(row, 'score_full')} {baseline}chance {row['chance']:.2f}; {paper}")
    return lines


STUDY = Study("remove_engram", Config, plan, report)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
