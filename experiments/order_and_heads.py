"""Which n-gram order carries what the memory knows, and how redundant are the hash heads?

Each order kept alone (the others replaced by their mean row), each head removed alone, and heads removed one after
another: with redundant heads a single loss costs nothing and the last few cost everything.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from engram_interp.figures.curve import Curve, curve_figure
from engram_interp.probes.ablation import Condition
from engram_interp.studies import Context, Plan, Report, Study, StudyConfig, main
from engram_interp.studies.ablation import ablation_plan, effects_table, first_seed, headline

TABLES = ("items", "effects")


def conditions(context: Context) -> list[Condition]:
    """Orders kept, single heads lost, and the first k heads lost for k = 2 to K."""
    ngram_hash = context.model.engram(context.model.engram_layers[0]).ngram_hash
    kept = [Condition(kind="keep_order", options={"order": n}) for n in ngram_hash.orders]
    lost = [(k,) for k in range(ngram_hash.heads)] + [tuple(range(k)) for k in range(2, ngram_hash.heads + 1)]
    return kept + [Condition(kind="heads", options={"heads": heads, "replace": "mean"}) for heads in lost]


def plan(context: Context) -> Plan:
    """One shard per seed and task."""
    return ablation_plan(context, conditions(context))


def report(context: Context, frames: dict[str, pd.DataFrame]) -> Report:
    """Change of log p against the number of heads lost."""
    effects = effects_table(frames["items"])
    dose = {c.label: len(c.options["heads"]) for c in conditions(context) if c.kind == "heads"}
    first = [c.label for c in conditions(context) if c.kind == "heads" and c.options["heads"][0] == 0]
    rows = first_seed(effects).set_index("condition")
    curves = []
    for task in list(dict.fromkeys(rows["task"]))[:7]:
        of = rows[rows["task"] == task].loc[first]
        values = [of["change_logprob" + end].to_numpy(dtype=np.float64) for end in ("", "_low", "_high")]
        curves.append(Curve(task, *values))
    figure = curve_figure(
        curves, [dose[label] for label in first], title="Hash heads removed, every order and block",
        x_title="heads removed", y_title="change of log p (nats)", zero=True,
    )  # fmt: skip
    shown = [c.label for c in conditions(context) if c.kind == "keep_order"] + [first[0], first[-1]]
    return Report({"effects": effects}, figure, headline(effects, shown))


STUDY = Study("order_and_heads", StudyConfig, plan, report)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
