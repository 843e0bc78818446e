"""What breaks without the memory, and is it the memory's content?

Every way of removing it, jointly and block by block, on every task family, beside controls of the same size. Compare
`output_zero` (what the paper did) with `equal_norm_random` (the same shock without content), `hash_permute` (the same
rows elsewhere), `optimal` (the least any constant can cost) and `mlp_zero` (another part of the block, as much of it).
"""

from __future__ import annotations

import pandas as pd
from pydantic import Field

from engram_interp.probes.ablation import Condition, default_conditions, retention_figure
from engram_interp.studies import Context, Plan, Report, Study, StudyConfig, main
from engram_interp.studies.ablation import (
    ablation_plan,
    effects_table,
    first_seed,
    headline,
    interaction_table,
    known_kinds,
)

TABLES = ("items", "effects", "interaction", "published")

# arXiv 2601.07372, figure 6 (raw) and table 1 (full score), in percent; chance by the number of answers.
PUBLISHED = (
    ("C3", "reading", 93, 63.6, 26), ("RACE-Middle", "reading", 89, 82.8, 25), ("RACE-High", "reading", 84, 78.2, 25),
    ("DROP", "reading", 81, 59.0, 0), ("HellaSwag", "commonsense", 85, 72.7, 25),
    ("ARC-Challenge", "commonsense", 81, 73.8, 25),
    ("PIQA", "commonsense", 81, 73.5, 50), ("CMMLU", "knowledge", 78, 61.9, 25), ("MMLU", "knowledge", 75, 60.4, 25),
    ("TriviaQA-ZH", "facts", 44, 76.3, 0), ("PopQA", "facts", 44, 19.4, 0), ("TriviaQA", "facts", 29, 50.7, 0),
)  # fmt: skip


class Config(StudyConfig):
    """`kinds` are ablated on all memories together and on each alone."""

    kinds: tuple[str, ...] = Field(min_length=1)


def conditions(context: Context) -> list[Condition]:
    """Every kind, jointly and per block."""
    return default_conditions(context.model, known_kinds(context.config.kinds))


def plan(context: Context) -> Plan:
    """One shard per seed and task."""
    return ablation_plan(context, conditions(context))


def published() -> pd.DataFrame:
    """The paper's retained fractions, raw as printed and corrected for chance."""
    rows = [
        (name, family, kept / 100, (kept / 100 * full - chance) / (full - chance), full, chance)
        for name, family, kept, full, chance in PUBLISHED
    ]
    return pd.DataFrame(rows, columns=["benchmark", "family", "retained", "retained_above_chance", "full", "chance"])


def report(context: Context, frames: dict[str, pd.DataFrame]) -> Report:
    """Effects with intervals, interaction of the blocks, and the paper's numbers beside them."""
    effects, joint = effects_table(frames["items"]), [c.label for c in conditions(context) if c.blocks is None]
    tables = {"effects": effects, "published": published()}
    tables["interaction"] = interaction_table(frames["items"], conditions(context))
    return Report(tables, retention_figure(first_seed(effects), joint), headline(effects, joint))


STUDY = Study("remove_engram", Config, plan, report)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
