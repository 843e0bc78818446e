"""What breaks without the memory, and by how much?

For every task and condition, paired over the same items: the retained fraction of the score, raw (what the Engram paper
prints) and corrected for chance; the change of accuracy, of the answer's log-probability and of the loss per token;
KL(full || ablated). All with intervals over items (whole documents where items share one). "Not estimable" where the
full score cannot be told from chance: a fraction of nothing means nothing. Cost: one forward per condition. Misleads:
intervals describe other items for this checkpoint, never another training seed; effects are totals, since later layers
may repair what was taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from engram_interp.hooks.ablation import ablate
from engram_interp.hooks.statistics import MemoryStatistics
from engram_interp.measure.statistics import Estimate, SharedDraws, mean_interval, paired_difference, retained_fraction
from engram_interp.models.batching import BATCH_TOKENS
from engram_interp.models.config import StrictModel
from engram_interp.models.protocol import Decoder, MemoryModel
from engram_interp.probes.scoring import score_items
from engram_interp.probes.tasks import Task
from engram_interp.runs import Provenance, texts_hash

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

FULL = "full"
DEFAULT_KINDS = ("output_zero", "mean", "resample", "hash_permute", "equal_norm_random", "mlp_zero")


class Condition(StrictModel):
    """One ablation by name: the arguments of `ablate`."""

    kind: str
    blocks: tuple[int, ...] | None = None
    branches: tuple[int, ...] | None = None
    options: dict[str, object] = Field(default_factory=dict)
    name: str = ""

    @property
    def label(self) -> str:
        """The given name, or one made of kind, options and blocks."""
        if self.name:
            return self.name
        parts = [self.kind, *(f"{k}={_short(v)}" for k, v in self.options.items())]
        if self.branches is not None:
            parts.append(f"branches={_short(self.branches)}")
        return " ".join(parts) + ("" if self.blocks is None else f" @ block {_short(self.blocks)}")


def _short(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def default_conditions(model: MemoryModel, kinds: Sequence[str] = DEFAULT_KINDS) -> list[Condition]:
    """Every kind on all memories jointly, then on each block by itself."""
    sets = [None, *((b,) for b in model.engram_layers)] if len(model.engram_layers) > 1 else [None]
    return [Condition(kind=kind, blocks=blocks) for kind in kinds for blocks in sets]


@dataclass(frozen=True, eq=False)
class AblationEffects:
    """Per-item results (`items`) and their summary (`table`).

    `items` has a row per task, item and condition ("full" included): logprob and margin in nats, correct 0/1, kl in
    nats, tokens of the answer.
    """

    model: str
    items: pd.DataFrame = field(repr=False)
    conditions: tuple[Condition, ...]
    provenance: Provenance = field(repr=False)
    seed: int = 0

    def table(self) -> pd.DataFrame:
        """One row per task and condition; every estimate as value, `_low`, `_high`."""
        return summarise(self.items, self.seed)

    def interaction(self) -> pd.DataFrame:
        """Change of log p (nats) under joint ablation minus the sum over single blocks, where both exist."""
        return interaction(self.items, self.conditions)

    def figure(self) -> go.Figure:
        """Chance-corrected retention of the joint ablations by task; a gap where it is not estimable."""
        return retention_figure(self.table(), [c.label for c in self.conditions if c.blocks is None])

    def as_dict(self) -> dict[str, object]:
        """Plain data: `model`, `rows` (of the table) and `provenance`."""
        rows = self.table().astype(object).where(lambda frame: frame.notna(), None).to_dict("records")
        return {"model": self.model, "rows": rows, "provenance": self.provenance.as_dict()}


def ablation_effects(
    model: Decoder,
    tasks: Sequence[Task],
    conditions: Sequence[Condition],
    *,
    statistics: MemoryStatistics | None = None,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    progress: bool = False,
    after_task: Callable[[AblationEffects], None] | None = None,
) -> AblationEffects:
    """Score every item with the memory and without it.

    Args: statistics: for the conditions that need data; seed: of the bootstrap; after_task: is given the result of the
        tasks done so far after each but the last.
    Raises: ValueError for no task, no condition, two conditions of one label, or a condition the model cannot have
        (checked before anything runs).

    >>> import engram_interp
    >>> from engram_interp.probes import Condition, ablation_effects
    >>> from engram_interp.probes.tasks import load_tasks
    >>> model = engram_interp.load("mini-engram")
    >>> tasks = load_tasks(["gallery_entity"], model.tokenizer, limit=8)
    >>> nothing = Condition(kind="gate_scale", options={"scale": 1.0})  # every gate as it is
    >>> effects = ablation_effects(model, tasks, [Condition(kind="output_zero"), nothing])
    >>> effects.table()[["condition", "items"]].values.tolist()
    [['output_zero', 8], ['gate_scale scale=1.0', 8]]
    >>> float(effects.items.query("condition == 'gate_scale scale=1.0'")["kl"].abs().max())
    0.0
    """
    _check(tasks, conditions)
    entries = [partial(_enter, model, c, statistics) for c in conditions]
    for enter in entries:
        with enter():
            pass
    first_blocks = [0, *(min(c.blocks or model.engram_layers) for c in conditions)]  # type: ignore[attr-defined]
    frames = []
    for number, task in enumerate(tasks, start=1):
        scores = score_items(
            model,
            task.items,
            [nullcontext, *entries],
            first_blocks=first_blocks,
            batch_tokens=batch_tokens,
            progress=task.name if progress else "",
        )
        frames += [_frame(task, label, scores, c) for c, label in enumerate([FULL, *(c.label for c in conditions)])]
        if after_task is not None and number < len(tasks):
            after_task(_effects(model, tasks[:number], conditions, frames, seed))
    return _effects(model, tasks, conditions, frames, seed)


def _effects(
    model: Decoder, tasks: Sequence[Task], conditions: Sequence[Condition], frames: list[pd.DataFrame], seed: int
) -> AblationEffects:
    import pandas as pd

    texts = [f"{item.id}\t{item.prompt}\t{item.choices}" for task in tasks for item in task.items]
    options = {"tasks": [t.name for t in tasks], "conditions": [c.label for c in conditions], "seed": seed}
    options["condition_options"] = {
        c.label: dict(c.options) for c in conditions if c.options
    }  # a given name hides them
    provenance = Provenance(
        {model.identity.name: model.identity.weights_sha256}, texts_hash(texts), len(texts), options
    )
    items = pd.concat(frames, ignore_index=True)
    return AblationEffects(model.identity.name, items, tuple(conditions), provenance, seed)


def full_scores(model: Decoder, task: Task, *, batch_tokens: int = BATCH_TOKENS) -> pd.DataFrame:
    """The "full" rows alone: what a model (a baseline) scores as it is."""
    return _frame(task, FULL, score_items(model, task.items, [nullcontext], batch_tokens=batch_tokens), 0)


def _check(tasks: Sequence[Task], conditions: Sequence[Condition]) -> None:
    labels = [FULL, *(c.label for c in conditions)]
    if not tasks or not conditions or len(set(labels)) != len(labels):
        raise ValueError(f"expected tasks and conditions of distinct labels, found {len(tasks)} tasks, {labels[1:]}")
    if len({t.name for t in tasks}) != len(tasks):
        raise ValueError(f"expected tasks of distinct names, found {[t.name for t in tasks]}")


def _enter(model: Decoder, condition: Condition, statistics: MemoryStatistics | None):  # noqa: ANN202
    options: dict[str, Any] = condition.options
    return ablate(
        model, condition.kind, blocks=condition.blocks, branches=condition.branches, statistics=statistics, **options
    )


def _frame(task: Task, label: str, scores, row: int) -> pd.DataFrame:  # noqa: ANN001
    import pandas as pd

    return pd.DataFrame(
        {
            "task": task.name,
            "family": task.family,
            "item": [i.id for i in task.items],
            "group": [i.group or i.id for i in task.items],
            "chance": [i.chance for i in task.items],
            "condition": label,
            "correct": scores.correct[row],
            "logprob": scores.logprob[row],
            "margin": scores.margin[row],
            "kl": scores.kl[row],
            "tokens": scores.tokens,
        }
    )


def summarise(items: pd.DataFrame, seed: int = 0, by: str = "task") -> pd.DataFrame:
    """Paired estimates by task (or by "family": items of its tasks pooled) and condition from per-item rows."""
    import pandas as pd

    rows = []
    for task, frame in items.groupby(by, sort=False):
        full = frame.loc[frame["condition"] == FULL]
        draws = SharedDraws(np.random.default_rng(seed))
        for label, ablated in frame.groupby("condition", sort=False):
            if label != FULL:
                rows.append({by: task, "condition": label, **_summary(full, ablated, draws)})
    return pd.DataFrame(rows)


def _summary(full: pd.DataFrame, ablated: pd.DataFrame, draws: SharedDraws) -> dict[str, object]:
    if full["item"].tolist() != ablated["item"].tolist():
        raise ValueError("expected the same items in the same order under every condition")
    a, b = ({k: f[k].to_numpy(dtype=float) for k in ("correct", "logprob", "kl", "tokens")} for f in (full, ablated))
    groups = full["group"].to_numpy(dtype=str)
    chance = float(full["chance"].mean())  # pyright: ignore[reportArgumentType] - pandas: the mean of a column is a number
    kept = retained_fraction(a["correct"], b["correct"], groups, rng=draws, chance=chance)
    paired = partial(paired_difference, groups=groups, rng=draws)
    estimates = {
        "score_full": kept.full,
        "score": kept.ablated,
        "retained": kept.raw,
        "retained_above_chance": kept.corrected,
        "change_score": kept.difference,
        "change_logprob": paired(b["logprob"], a["logprob"]),
        "change_loss": paired(-b["logprob"] / b["tokens"], -a["logprob"] / a["tokens"]),
        "kl": mean_interval(b["kl"], groups),
    }
    head = {"family": full["family"].iloc[0], "items": len(full), "groups": len(set(groups)), "chance": chance}
    return {**head, "reason": kept.corrected.reason, **_columns(estimates)}


def _columns(estimates: Mapping[str, Estimate]) -> dict[str, float]:
    return {
        f"{name}{end}": getattr(e, part)
        for name, e in estimates.items()
        for end, part in (("", "value"), ("_low", "low"), ("_high", "high"))
    }


def interaction(items: pd.DataFrame, conditions: Sequence[Condition]) -> pd.DataFrame:
    """Change of log p under joint ablation minus the sum over single blocks, per task and kind, with an interval."""
    import pandas as pd

    rows = []
    for joint in (c for c in conditions if c.blocks is None):
        like = [
            c
            for c in conditions
            if c.blocks and len(c.blocks) == 1 and c.kind == joint.kind and c.options == joint.options
        ]
        if len(like) < 2:
            continue
        for task, frame in items.groupby("task", sort=False):
            by = {label: f["logprob"].to_numpy() for label, f in frame.groupby("condition")}
            excess = (by[joint.label] - by[FULL]) - sum(by[c.label] - by[FULL] for c in like)
            groups = frame.loc[frame["condition"] == FULL, "group"].to_numpy(dtype=str)
            rows.append(
                {"task": task, "condition": joint.label, **_columns({"excess_logprob": mean_interval(excess, groups)})}
            )
    return pd.DataFrame(
        rows, columns=["task", "condition", "excess_logprob", "excess_logprob_low", "excess_logprob_high"]
    )


def retention_figure(table: pd.DataFrame, labels: Sequence[str]) -> go.Figure:
    """Bars of the retained fraction above chance: tasks side by side, one bar per condition."""
    from engram_interp.figures.bars import Bars, bars_figure

    tasks = list(dict.fromkeys(table["task"]))
    shown = [label for label in labels if label in set(table["condition"])] or list(dict.fromkeys(table["condition"]))
    name = "retained_above_chance"
    bars = []
    for label in shown:
        rows = table[table["condition"] == label].set_index("task").reindex(tasks)
        bars.append(Bars(label, *(rows[name + end].to_numpy(dtype=float) for end in ("", "_low", "_high"))))
    return bars_figure(
        bars, tasks, title="What is left without the memory", y_title="retained fraction above chance (95 % interval)",
        reference=[("unchanged", 1.0)],
    )  # fmt: skip
