"""Which memory and which residual stream does each ability need?

The write is zeroed in every block, every branch of it, and every branch across blocks; the gated value and the
convolution of each block are taken apart. All (layer, branch) pairs are shown: none is selected.
"""

from __future__ import annotations

import pandas as pd

from engram_interp.figures.signed_map import signed_map
from engram_interp.probes.ablation import Condition
from engram_interp.studies import Context, Plan, Report, Study, StudyConfig, main
from engram_interp.studies.ablation import ablation_plan, effects_table, first_seed, headline

TABLES = ("items", "effects")


def conditions(context: Context) -> list[Condition]:
    """Blocks, branches, blocks x branches, and the two paths of each block."""
    blocks = context.model.engram_layers
    branches = range(context.model.engram(blocks[0]).options.branches)
    sets = [(None, None), *((None, (m,)) for m in branches if len(branches) > 1)]
    sets += [((b,), None) for b in blocks] + [((b,), (m,)) for b in blocks for m in branches if len(branches) > 1]
    zero = [Condition(kind="output_zero", blocks=b, branches=m) for b, m in sets]
    has_conv = context.model.engram(blocks[0]).options.conv_kernel > 0
    paths = [Condition(kind=kind, blocks=(b,)) for b in blocks for kind in ("conv_off", "gated_off") if has_conv]
    return zero + paths


def plan(context: Context) -> Plan:
    """One shard per seed and task."""
    return ablation_plan(context, conditions(context))


def report(context: Context, frames: dict[str, pd.DataFrame]) -> Report:
    """Change of log p by condition and task."""
    effects, labels = effects_table(frames["items"]), [c.label for c in conditions(context)]
    grid = first_seed(effects).pivot(index="condition", columns="task", values="change_logprob").loc[labels]
    figure = signed_map(
        grid.to_numpy(dtype=float), labels, list(grid.columns), title="Change of the answer's log p", unit="nats"
    )
    return Report({"effects": effects}, figure, headline(effects, labels))


STUDY = Study("layer_and_branch", StudyConfig, plan, report)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
