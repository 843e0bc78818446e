"""How does a study that trains models run? `python -m experiments.NAME CONFIG [--seeds ...] [--out DIR] [--smoke]`

A base run and a list of variants, each a few changed keys of it. Every (variant, seed) is one shard of the run folder: it is
trained (a killed one resumes onto the same trajectory), then read on held-out articles, which all variants share, so that every
variant is compared with the first one article by article. Misleads: at a few million tokens the order of two variants can change
with more training; the interval is over articles, and only `--seeds` shows the spread between trainings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field
from tokenizers import Tokenizer

from engram_interp.gallery.files import read_jsonl
from engram_interp.gallery.sentences import SENTENCES
from engram_interp.measure.statistics import paired_difference
from engram_interp.models.checkpoint import TOKENIZER, load_model
from engram_interp.models.config import StrictModel
from engram_interp.models.cost import active_flops, memory_parameters, parameter_count
from engram_interp.models.registry import BUNDLED, find
from engram_interp.runs import texts_hash
from engram_interp.runs.folder import start_run
from engram_interp.studies.evaluation import article_losses
from engram_interp.studies.program import HEADLINE
from engram_interp.training.config import TrainConfig, load_train_config, parse_config
from engram_interp.training.corpus import write_token_file
from engram_interp.training.train import Trainer

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


class Variant(StrictModel):
    """One way to train: dotted keys of the base run and their new values, such as `model.engram.heads: 4`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+=-]*$")
    change: dict[str, Any] = Field(default_factory=dict)


class TrainingStudyConfig(StrictModel):
    """`base`: a training configuration; `tokens` trained per run; the first `articles` of `held_out` are read, each up to
    `characters` of it. `smoke` are changes that make every run a matter of seconds, to test the plumbing and nothing else.
    """

    base: Path = Field(strict=False)
    tokens: int = Field(ge=1)
    variants: tuple[Variant, ...] = ()
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    held_out: Path = Field(strict=False)
    articles: int = Field(40, ge=2)
    characters: int = Field(4000, ge=100)
    smoke: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class TrainingStudy:
    """A name, its configuration, and what it concludes from the articles of every run: lines to print and a figure.

    `variants` makes the variants from the configuration and the base run, where the file does not list them.
    """

    name: str
    config: type[TrainingStudyConfig]
    conclude: Callable[[TrainingStudyConfig, pd.DataFrame], tuple[list[str], go.Figure]]
    variants: Callable[[TrainingStudyConfig, TrainConfig], tuple[Variant, ...]] = lambda config, base: config.variants


def with_changes(config: TrainConfig, changes: dict[str, Any], where: str) -> TrainConfig:
    """The run with some keys changed, checked as strictly as a file.

    Raises: ConfigError naming a key that does not exist or a value that does not fit.
    """
    plain = config.model_dump()
    for key, value in changes.items():
        *path, last = key.split(".")
        target: Any = plain
        for part in path:
            target = target.get(part) if isinstance(target, dict) else None
        if not isinstance(target, dict) or last not in target:
            raise ValueError(f"{where}: no key {key!r} in the base run")
        target[last] = value
    return parse_config(TrainConfig, plain, where)


def smoke_version(config: TrainingStudyConfig, folder: Path) -> TrainingStudyConfig:
    """The study at a size of seconds, on the bundled sentences and tokenizer, so that it runs without a corpus.

    Args: folder: where its token file goes.
    """
    tokenizer = find(BUNDLED[0]) / TOKENIZER
    tokens = folder / "sentences.bin"
    folder.mkdir(parents=True, exist_ok=True)
    write_token_file(tokens, [SENTENCES], Tokenizer.from_file(str(tokenizer)))
    paths = {"tokenizer": tokenizer, "train_tokens": tokens, "held_out_tokens": None}
    changes = {**config.smoke, **paths}
    return config.model_copy(
        update={"smoke": changes, "held_out": SENTENCES, "articles": 4, "seeds": config.seeds[:1], "characters": 100}
    )


def run_config(config: TrainingStudyConfig, variant: Variant, seed: int, out: Path) -> TrainConfig:
    """The training configuration of one shard."""
    base = {"tokens": config.tokens, "seed": seed, "out": out, "model.name": variant.name}
    changes = {**base, **variant.change, **config.smoke}
    return with_changes(load_train_config(config.base), changes, f"variant {variant.name!r}")


def run_training_study(study: TrainingStudy, config: TrainingStudyConfig, out: Path) -> pd.DataFrame:
    """Train what is missing, compare, and leave `articles`, `runs`, a conclusion and a figure in the run folder.

    Returns: `articles`, one row per variant, seed and article; `compare_runs` sums it up.
    Raises: ConfigError before anything is trained when a variant does not fit; RunError when the folder holds another run.
    """
    records = islice(read_jsonl(config.held_out), config.articles)
    texts = [str(record["text"])[: config.characters] for record in records]
    variants = study.variants(config, load_train_config(config.base))
    if not variants:
        raise ValueError(f"study {study.name!r}: expected at least one variant, found none")
    shards = {f"{v.name}-s{seed}": (v, seed) for v in variants for seed in config.seeds}
    plans = {name: run_config(config, v, seed, out / "training" / name) for name, (v, seed) in shards.items()}
    described = config.model_dump(mode="json", exclude={"seeds"})
    with start_run(
        out, study=study.name, config=described, seeds=config.seeds, models={}, texts_sha256=texts_hash(texts)
    ) as folder:
        done = set(folder.done_shards("articles"))
        for name, plan in plans.items():
            if name not in done:
                variant, seed = shards[name]
                folder.write_shard("articles", name, _articles(plan, variant, seed, texts))
        frame = folder.gather("articles", list(shards))
        folder.write_table("runs", compare_runs(frame, variants[0].name))
        lines, figure = study.conclude(config, frame)
        folder.write_text(HEADLINE, "\n".join(lines) + "\n")
        folder.write_text("figure.html", figure.to_html(include_plotlyjs=True))
    return frame


def _articles(plan: TrainConfig, variant: Variant, seed: int, texts: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    started = time.monotonic()
    Trainer(plan).run()
    minutes = (time.monotonic() - started) / 60
    loss, tokens, size = article_losses(load_model(plan.out), texts)
    columns = {"article": np.arange(len(texts)), "loss": loss, "tokens": tokens, "bytes": size}
    cost = active_flops(plan.model)
    return pd.DataFrame({
        "variant": variant.name, "seed": seed, **columns, "parameters": parameter_count(plan.model),
        "memory_parameters": memory_parameters(plan.model), "flops": cost.total, "backbone_flops": cost.backbone,
        "trained_tokens": plan.steps * plan.tokens_per_step, "minutes": minutes,
    })  # fmt: skip


def compare_runs(articles: pd.DataFrame, first: str) -> pd.DataFrame:
    """Per variant and seed: nats per token, bits per byte, and its difference from the first variant of the same seed in bits
    per byte, with a 95 % interval over articles (bytes weigh, so tokenizers compare).
    """
    import pandas as pd

    rows = []
    for name, seed in articles[["variant", "seed"]].drop_duplicates().itertuples(index=False):
        run = articles.query("variant == @name and seed == @seed")
        base = articles.query("variant == @first and seed == @seed")
        weight = run["bytes"].to_numpy() / run["bytes"].mean()
        bits, base_bits = (part["loss"].to_numpy() / np.log(2) / part["bytes"].to_numpy() for part in (run, base))
        groups = run["article"].to_numpy().astype(str)
        gap = paired_difference(bits * weight, base_bits * weight, groups, rng=np.random.default_rng(0))
        rows.append({
            "variant": name, "seed": seed, "nats_per_token": run["loss"].sum() / run["tokens"].sum(),
            "bits_per_byte": run["loss"].sum() / np.log(2) / run["bytes"].sum(),
            "difference": gap.value, "low": gap.low, "high": gap.high,
            **run.iloc[0][["parameters", "memory_parameters", "flops", "trained_tokens", "minutes"]].to_dict(),
        })  # fmt: skip
    return pd.DataFrame(rows)


def shown_difference(run: pd.Series) -> str:
    """The difference of one row of `compare_runs` with its interval."""
    return f"{run['difference']:+.4f} [{run['low']:.4f}, {run['high']:.4f}]"
