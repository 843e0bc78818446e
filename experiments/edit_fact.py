"""Can facts be rewritten in the table, and what else changes with them?

Each fact is edited in closed form and by gradient, as an overlay; the checkpoint stays as it is. Facts are those of the
configuration (once) and `drawn` ones per seed: a learnable fact of LRE with the object of another subject as its new
answer. Side effects are followed through the prompt with its continuation and through a corpus: positions that read an
edited row, that the convolution reaches, or that come later, each with the KL of their prediction before and after.
`tensors/` holds every edit as an overlay file.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from engram_interp.figures.bars import Bars, bars_figure
from engram_interp.hooks.overlay import Overlay, RowEdit, overlay_tensors
from engram_interp.measure.statistics import Estimate, mean_interval, not_estimable, proportion_interval
from engram_interp.models.config import StrictModel
from engram_interp.probes.editing import EditResult, edit_slots
from engram_interp.probes.specificity import edit_specificity
from engram_interp.probes.tasks import load_tasks
from engram_interp.runs import texts_hash
from engram_interp.studies import Context, Plan, Report, Shard, Study, StudyConfig, main
from engram_interp.studies.texts import fit_texts

TABLES = ("edits", "reach", "ngrams", "rows")
METHODS = ("closed_form", "gradient")
REACHED = ("reads", "conv", "later")
_FOLLOWING = 300  # characters of a corpus text that follow a drawn fact


class Fact(StrictModel):
    """What to change: `target` (with its space) should follow `prompt`; `continuation` is text to follow it with."""

    prompt: str
    target: str
    continuation: str


class Config(StudyConfig):
    """`drawn` facts per seed (they need the data folder); `steps` of the gradient method."""

    facts: tuple[Fact, ...]
    drawn: int = Field(0, ge=0)
    steps: int = Field(60, ge=1)


def facts_of(context: Context, seed: int, corpus: tuple[str, ...]) -> tuple[Fact, ...]:
    """The facts of one seed: with the first seed those of the configuration, then the drawn ones."""
    config = context.config
    facts = config.facts if seed == config.seeds[0] else ()
    if config.drawn:
        (task,) = load_tasks(["lre"], context.model.tokenizer, data=config.data, limit=config.drawn, seed=seed)
        after = np.random.default_rng((seed, 1)).integers(0, len(corpus), len(task.items))
        texts = [" " + corpus[i][:_FOLLOWING] for i in after]
        drawn = [(f"{item.prompt}", f"{item.choices[1]}") for item in task.items]
        facts += tuple(Fact(prompt=p, target=t, continuation=c) for (p, t), c in zip(drawn, texts, strict=True))
    return facts


def plan(context: Context) -> Plan:
    """One shard per seed, method and fact, with a piece of every table."""
    corpus = fit_texts(context.config)
    facts = {seed: facts_of(context, seed, corpus) for seed in context.config.seeds}

    if not any(facts.values()):
        raise ValueError("expected facts, or drawn > 0 with a data folder; found neither")

    def shard(seed: int, method: str, number: int) -> Shard:
        label = {"seed": seed, "method": method, "fact": number}
        make = partial(measure, context, facts[seed][number], label, corpus)
        return Shard(TABLES, f"seed{seed}-{method}-{number:03}", make)

    shards = [shard(s, method, n) for s in facts for method in METHODS for n in range(len(facts[s]))]
    return Plan(tuple(shards), texts_hash([*corpus, *(f"{fact}" for s in facts for fact in facts[s])]))


def measure(context: Context, fact: Fact, label: dict[str, object], corpus: tuple[str, ...]) -> dict[str, pd.DataFrame]:
    """One edit: whether it took, how far it reaches, which n-grams share its rows, and the rows themselves."""
    edit = edit_slots(context.model, fact.prompt, fact.target, method=f"{label['method']}", steps=context.config.steps)
    report = edit_specificity(context.model, edit.overlay, [fact.prompt + fact.continuation, *corpus])
    names = ("trigger", "logprob_before", "logprob_after", "success", "relative_size")
    took = {"prompt": fact.prompt, "target": fact.target, **{name: getattr(edit, name) for name in names}}
    frames = {"edits": pd.DataFrame([took | {"rows": edit.overlay.rows}]), "rows": _rows(edit)}
    frames |= {"reach": report.table(), "ngrams": report.ngrams()}
    return {name: frame.assign(**label) for name, frame in frames.items()}


def _rows(edit: EditResult) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"block": block, "row": row, "values": values}
            for block, edited in edit.overlay.edits.items()
            for row, values in zip(edited.rows.tolist(), edited.values.tolist(), strict=True)
        ]
    )


def overlays(context: Context, frames: Mapping[str, pd.DataFrame]) -> dict[str, Overlay]:
    """Every edit again, by the name of its shard."""
    about = frames["edits"].set_index(["seed", "method", "fact"])[["prompt", "target"]]
    found = {}
    for (seed, method, fact), rows in frames["rows"].groupby(["seed", "method", "fact"], sort=False):
        edits = {
            int(block): RowEdit(torch.tensor(of["row"].tolist()), torch.tensor([list(v) for v in of["values"]]).float())
            for block, of in rows.groupby("block", sort=False)
        }
        text = about.loc[(seed, method, fact)].to_dict() | {"method": method}
        found[f"seed{seed}-{method}-{fact:03}"] = Overlay(edits, context.model.identity.weights_sha256, text)
    return found


def report(context: Context, frames: Mapping[str, pd.DataFrame]) -> Report:
    """Success by method, and the mean KL of each class of position with its interval over facts."""
    edits, reach = frames["edits"], frames["reach"]
    kl = {
        method: [
            _mean(reach.loc[(reach["method"] == method) & (reach["reached"] == c), "kl"].dropna()) for c in REACHED
        ]
        for method in METHODS
    }
    bars = [
        Bars(m, *(np.array([getattr(e, part) for e in kl[m]]) for part in ("value", "low", "high"))) for m in METHODS
    ]
    figure = bars_figure(
        bars, REACHED, title="Side effects of an edit (mean over facts, 95 % interval)",
        y_title="KL(before || after), nats",
    )  # fmt: skip
    lines = []
    for method in METHODS:
        took = proportion_interval(edits.loc[edits["method"] == method, "success"].to_numpy(dtype=float))
        effects = ", ".join(f"{c} {e}" for c, e in zip(REACHED, kl[method], strict=True))
        lines.append(f"{method:12} took in {took} of {took.rows} facts; KL in nats at positions by reach: {effects}")
    tensors = {name: overlay_tensors(overlay) for name, overlay in overlays(context, frames).items()}
    return Report({}, figure, tuple(lines), tensors)


def _mean(values: pd.Series) -> Estimate:
    if len(values) < 2:
        return not_estimable(f"{len(values)} facts", len(values))
    return mean_interval(values.to_numpy(dtype=float))


STUDY = Study("edit_fact", Config, plan, report)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
