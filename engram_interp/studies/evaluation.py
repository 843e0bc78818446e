"""What does a model know? The evaluation suite: one score per task, each with its chance level and interval.

Loss on held-out articles (nats per token, bits per byte; articles are the units); accuracy on phrases, copying, LAMBADA, BLiMP
and induction (items or whole documents are the units); for facts the rank of the right object among all objects of its relation,
since a small model almost never says it first. Items carry ids, so two models compare item by item. Misleads: scores of different
tasks are not on one scale, chance differs; an interval describes other items, never another training seed; a rank by total
log-probability favours short and frequent objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from engram_interp.gallery.files import read_jsonl
from engram_interp.kernels.losses import token_losses
from engram_interp.measure.statistics import Estimate, mean_interval, paired_difference
from engram_interp.models.batching import BATCH_TOKENS, batches, right_padded
from engram_interp.models.protocol import Decoder
from engram_interp.models.text import start_tokens, windows
from engram_interp.probes.scoring import score_items
from engram_interp.probes.tasks import Task, load_tasks
from engram_interp.runs import Provenance, texts_hash

if TYPE_CHECKING:
    import pandas as pd

HELD_OUT = "enwiki_2015_core.heldout.jsonl.zst"
# Score name -> task of `engram_interp.probes.tasks` and the file it needs below --data.
DATA_SCORES = {
    "phrase_entity": ("wiki_entity", "factual.wiki_static_phrase"),
    "phrase_generic": ("wiki_phrase", "factual.wiki_static_phrase"),
    "context_copy": ("wiki_context_copy", "context.wiki_context_copy"),
    "lre": ("lre", "factual.lre"),
    "known_1000": ("known_1000", "factual.known_1000"),
    "lambada": ("lambada", "context.lambada_test"),
    "blimp": ("blimp", "linguistic.blimp"),
}
RANKED = ("lre", "known_1000")  # scored by rank: 1 first, 0 last, chance 1/2
GENERATED_SCORES = {"phrase_entity": "gallery_entity", "phrase_generic": "gallery_phrase"}


@dataclass(frozen=True)
class Score:
    """One task: accuracy (rank for facts, nats per token for `heldout_loss`), its chance level, the mean log-probability in nats.

    `first`: for facts, how often the right object is the most probable one, and its chance level.
    """

    task: str
    value: Estimate
    chance: float | None
    logprob: Estimate | None
    source: str
    first: tuple[Estimate, float] | None = None

    def as_dict(self) -> dict[str, object]:
        """`value`, `low`, `high`, `chance`, `n`, and `logprob` likewise."""
        data: dict[str, object] = {
            "value": self.value.value,
            "low": self.value.low,
            "high": self.value.high,
            "chance": self.chance,
            "n": self.value.rows or self.value.n,
            "source": self.source,
        }
        if self.first is not None:
            estimate, chance = self.first
            data["first"] = {"value": estimate.value, "low": estimate.low, "high": estimate.high, "chance": chance}
        if self.logprob is not None:
            data["logprob"] = {"value": self.logprob.value, "low": self.logprob.low, "high": self.logprob.high}
        return data


@dataclass(frozen=True, eq=False)
class Evaluation:
    """All scores of one model. `items`: task, item, group, correct, rank, logprob (for `heldout_loss`: loss, tokens, bytes)."""

    model: str
    scores: dict[str, Score]
    bits_per_byte: Estimate | None
    missing: tuple[str, ...]
    items: pd.DataFrame = field(repr=False)
    provenance: Provenance = field(repr=False)

    def as_dict(self) -> dict[str, object]:
        """`scores` by task, `bits_per_byte`, what was left out, provenance."""
        return {
            "model": self.model,
            "scores": {name: score.as_dict() for name, score in self.scores.items()},
            "bits_per_byte": self.bits_per_byte.as_dict() if self.bits_per_byte else None,
            "missing": list(self.missing),
            "provenance": self.provenance.as_dict(),
        }

    def table(self) -> pd.DataFrame:
        """One row per task."""
        import pandas as pd

        return pd.DataFrame([{"task": name, **score.as_dict()} for name, score in self.scores.items()])


@dataclass(frozen=True)
class _Piece:
    """One window of a text: its tokens from `first` on are new, and predicted."""

    text: int
    tokens: tuple[int, ...]
    first: int


@torch.no_grad()
def article_losses(
    model: Decoder, texts: Sequence[str], *, batch_tokens: int = BATCH_TOKENS, progress: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Summed next-token loss (nats), tokens and UTF-8 bytes of each text; windows overlap, every token counts once.

    Args: batch_tokens: windows are read together up to so many tokens; 1 reads one at a time.
    """
    from tqdm import tqdm

    start = len(start_tokens(model))
    pieces = [
        _Piece(n, tuple(window.tokens[0].tolist()), max(window.keep.start, start, 1))
        for n, text in enumerate(texts)
        for window in windows(model, text, limit=10**9)
    ]
    total, tokens = np.zeros(len(texts)), np.zeros(len(texts))
    with tqdm(total=len(pieces), unit="window", desc="held-out loss", disable=not progress) as bar:
        for batch in batches(pieces, batch_tokens):
            hidden = model.exit_hidden(model.residuals(right_padded([p.tokens for p in batch]))[-1])
            read = torch.cat([h[p.first - 1 : len(p.tokens) - 1] for h, p in zip(hidden, batch, strict=True)])
            targets = torch.tensor([token for p in batch for token in p.tokens[p.first :]])
            counts = [len(p.tokens) - p.first for p in batch]
            losses = token_losses(read, model.unembed, targets).double().split(counts)
            of = [p.text for p in batch]
            np.add.at(total, of, [float(part.sum()) for part in losses])
            np.add.at(tokens, of, counts)
            bar.update(len(batch))
    return total, tokens, np.array([len(text.encode()) for text in texts], dtype=np.float64)


def evaluate(
    model: Decoder,
    data: Path | None = None,
    *,
    limit: int = 2000,
    articles: int | None = None,
    seed: int = 0,
    hub: Sequence[str] = (),
    progress: bool = False,
) -> Evaluation:
    """Run the suite.

    Args: data: folder laid out as the README says; a missing file leaves its task out and is listed in `missing`. None runs the
        bundled gallery and the generated tasks. limit: items per task, drawn by `seed`; articles: held-out articles (all); hub:
        further tasks from Hugging Face data sets (`probes.task_hub`), such as "hub:popqa".
    """
    import pandas as pd

    names, missing = _plan(data)
    scores: dict[str, Score] = {}
    frames: list[pd.DataFrame] = []
    texts: list[str] = []
    bits = None
    if data is not None and "heldout_loss" not in missing:
        score, bits, frame, held_out = _held_out(model, data / HELD_OUT, articles, progress)
        scores["heldout_loss"], texts = score, held_out
        frames.append(frame)
    for name, task_name in {**names, **{task: task for task in hub}}.items():
        task = load_tasks([task_name], model.tokenizer, data=data, limit=limit, seed=seed, distractors=None)[0]
        scores[name], frame = _score(model, name, task, progress)
        frames.append(frame)
        texts += [f"{i.id}\t{i.prompt}\t{i.choices}" for i in task.items]
    provenance = Provenance(
        {model.identity.name: model.identity.weights_sha256},
        texts_hash(texts),
        len(texts),
        {"limit": limit, "articles": articles, "seed": seed, "data": data is not None, "hub": list(hub)},
    )
    return Evaluation(model.identity.name, scores, bits, missing, pd.concat(frames, ignore_index=True), provenance)


def _score(model: Decoder, name: str, task: Task, progress: bool) -> tuple[Score, pd.DataFrame]:
    import pandas as pd

    result = score_items(model, task.items, [nullcontext], progress=name if progress else "")
    groups = np.array([i.group or i.id for i in task.items])
    columns = {"correct": result.correct[0], "rank": result.rank[0], "logprob": result.logprob[0]}
    means = {quantity: mean_interval(values, groups) for quantity, values in columns.items() if quantity != "rank"}
    if name in RANKED:
        value, chance, first = mean_interval(result.rank[0], groups), 0.5, (means["correct"], task.chance)
    else:
        value, chance, first = means["correct"], task.chance, None
    frame = pd.DataFrame({"task": name, "item": [i.id for i in task.items], "group": groups, **columns})
    return Score(name, value, chance, means["logprob"], task.source, first), frame


def _plan(data: Path | None) -> tuple[dict[str, str], tuple[str, ...]]:
    """Task of each score, and the scores that cannot be had."""
    if data is None:
        return {**GENERATED_SCORES, "induction": "induction", "arithmetic": "arithmetic"}, (
            "heldout_loss",
            *(s for s in DATA_SCORES if s not in GENERATED_SCORES),
        )
    if not data.is_dir():
        raise ValueError(f"{data}: expected a folder with {HELD_OUT} and eval/, found none")
    names, missing = {}, [] if (data / HELD_OUT).is_file() else ["heldout_loss"]
    for score, (task, file) in DATA_SCORES.items():
        if (data / "eval" / f"{file}.jsonl.zst").is_file():
            names[score] = task
        else:
            missing.append(score)
    return {**names, "induction": "induction"}, tuple(missing)


def _held_out(
    model: Decoder, path: Path, articles: int | None, progress: bool
) -> tuple[Score, Estimate, pd.DataFrame, list[str]]:
    import pandas as pd

    records = [(str(r.get("title", n)), r["text"]) for n, r in enumerate(read_jsonl(path))][:articles]
    titles, texts = [t for t, _ in records], [t for _, t in records]
    loss, tokens, size = article_losses(model, texts, progress=progress)
    score = Score("heldout_loss", _ratio(loss, tokens), None, None, f"{len(texts)} held-out articles")
    bits = _ratio(loss / np.log(2), size)
    frame = pd.DataFrame(
        {"task": "heldout_loss", "item": titles, "group": titles, "loss": loss, "tokens": tokens, "bytes": size}
    )
    return score, bits, frame, texts


def _ratio(total: np.ndarray, size: np.ndarray) -> Estimate:
    """Total over size, articles as units: the mean per token with a cluster-robust interval."""
    ratio = total.sum() / size.sum()
    groups = len(total)
    se = float(np.sqrt(groups / (groups - 1) * np.square(total - ratio * size).sum()) / size.sum())
    from scipy import stats

    half = float(stats.t.ppf(0.975, groups - 1)) * se
    return Estimate(float(ratio), float(ratio - half), float(ratio + half), se, groups, rows=int(size.sum()))


def compare_evaluations(a: Evaluation, b: Evaluation, *, seed: int = 0) -> pd.DataFrame:
    """First minus second, paired by item: accuracy and log-probability per task, loss per token for the held-out articles.

    Raises: ValueError when the two were not evaluated on the same items.
    """
    import pandas as pd

    rows = []
    for task in a.scores:
        first, second = (e.items.loc[e.items["task"] == task] for e in (a, b))
        if first["item"].tolist() != second["item"].tolist():
            raise ValueError(f"{task}: expected both models on the same items, found different ones")
        for quantity, (x, y) in _paired_columns(task, first, second).items():
            gap = paired_difference(x, y, first["group"].to_numpy(dtype=str), rng=np.random.default_rng(seed))
            rows.append({"task": task, "quantity": quantity, "difference": gap.value, "low": gap.low, "high": gap.high})
    return pd.DataFrame(rows)


def _paired_columns(task: str, a: pd.DataFrame, b: pd.DataFrame) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    if task == "heldout_loss":
        # Weighted so that the mean over articles is the loss per token of the whole text.
        weight = a["tokens"].to_numpy() / a["tokens"].mean()
        return {"nats per token": tuple((f["loss"] / f["tokens"]).to_numpy() * weight for f in (a, b))}  # type: ignore[dict-item]
    quantities = ("rank", "correct", "logprob") if task in RANKED else ("correct", "logprob")
    return {q: (a[q].to_numpy(dtype=float), b[q].to_numpy(dtype=float)) for q in quantities}
