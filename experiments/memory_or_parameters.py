"""Is it memory, or are the extra parameters enough?

The same weights with other content: rows shuffled inside their heads, n-grams hashed anew, one row for everything, the
mean row. If the gain were parameters alone, these would cost as little as the memory's presence is worth without its
content; whatever they cost beyond `optimal` is addressed content. Holds for this trained model: one trained with a
single row may differ.
"""

from __future__ import annotations

import pandas as pd

from engram_interp.probes.ablation import Condition, retention_figure
from engram_interp.studies import Context, Plan, Report, Study, StudyConfig, main
from engram_interp.studies.ablation import ablation_plan, effects_table, first_seed, headline

TABLES = ("items", "effects")
KINDS = ("hash_permute", "hash_reseed", "one_row", "mean_row", "mean", "optimal", "output_zero", "equal_norm_random")


def plan(context: Context) -> Plan:
    """One shard per seed and task; the seed draws the shuffle and the new hash."""
    return ablation_plan(context, [Condition(kind=kind) for kind in KINDS])


def report(context: Context, frames: dict[str, pd.DataFrame]) -> Report:
    """Retained fraction above chance under each content."""
    effects = effects_table(frames["items"])
    return Report({"effects": effects}, retention_figure(first_seed(effects), KINDS), headline(effects, KINDS))


STUDY = Study("memory_or_parameters", StudyConfig, plan, report)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
