"""Can facts be rewritten in the table, and what else changes with them?

Each fact is edited in closed form and by gradient, as an overlay; the checkpoint stays as it is. Side effects are
followed through the prompt with its continuation and through a corpus: positions that read an edited row, that the
convolution reaches, or that come later, each with the KL of their prediction before and after.
"""

from __future__ import annotations

from functools import partial

import pandas as pd
from pydantic import Field

from engram_interp.figures.bars import Bars, bars_figure
from engram_interp.models.config import StrictModel
from engram_interp.probes.editing import edit_slots
from engram_interp.probes.specificity import edit_specificity
from engram_interp.runs import texts_hash
from engram_interp.studies import Context, Plan, Report, Shard, Study, StudyConfig, main
from engram_interp.studies.texts import fit_texts

TABLES = ("edits", "reach", "ngrams")
METHODS = ("closed_form", "gradient")


class Fact(StrictModel):
    """What to change: `target` (with its space) should follow `prompt`; `continuation` is text to follow it with."""

    prompt: str
    target: str
    continuation: str


class Config(StudyConfig):
    """`steps` of the gradient method."""

    facts: tuple[Fact, ...] = Field(min_length=1)
    steps: int = Field(60, ge=1)


def plan(context: Context) -> Plan:
    """One shard per table, method and fact; nothing is drawn at random, so seeds do not matter."""
    corpus = fit_texts(context.config)
    shards = [
        Shard(table, f"{method}-{number:03}", partial(measure, context, table, method, number, corpus))
        for table in TABLES
        for method in METHODS
        for number in range(len(context.config.facts))
    ]
    facts = [f"{fact}" for fact in context.config.facts]
    return Plan(tuple(shards), texts_hash([*corpus, *facts]))


def measure(context: Context, table: str, method: str, number: int, corpus: tuple[str, ...]) -> pd.DataFrame:
    """One edit: whether it took, how far it reaches, or which n-grams share its rows."""
    fact = context.config.facts[number]
    edit = edit_slots(context.model, fact.prompt, fact.target, method=method, steps=context.config.steps)
    label = {"method": method, "fact": number, "prompt": fact.prompt, "target": fact.target}
    if table == "edits":
        names = ("trigger", "logprob_before", "logprob_after", "success", "relative_size")
        return pd.DataFrame([{**label, **{name: getattr(edit, name) for name in names}, "rows": edit.overlay.rows}])
    report = edit_specificity(context.model, edit.overlay, [fact.prompt + fact.continuation, *corpus])
    return (report.table() if table == "reach" else report.ngrams()).assign(**label)


def report(context: Context, frames: dict[str, pd.DataFrame]) -> Report:
    """Success by method, and the mean KL of each class of position."""
    rates = frames["edits"].groupby("method")["success"].mean()
    reach = frames["reach"].groupby(["method", "reached"])["kl"].agg(["mean", "min", "max"])
    classes = ["reads", "conv", "later"]
    bars = [
        Bars(m, *(reach.loc[m].reindex(classes)[c].to_numpy(dtype=float) for c in ("mean", "min", "max")))
        for m in METHODS
    ]
    figure = bars_figure(
        bars,
        classes,
        title="Side effects of an edit (mean over facts, range as whiskers)",
        y_title="KL(before || after), nats",
    )
    lines = tuple(f"{method:12} took in {rates[method]:.0%} of {len(frames['edits']) // 2} facts" for method in METHODS)
    return Report({}, figure, lines)


STUDY = Study("edit_fact", Config, plan, report)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
