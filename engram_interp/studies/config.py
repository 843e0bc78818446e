"""What is one study? A strict YAML file: the model, the tasks, the texts, the seeds, and what this study needs."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import Field, model_validator

from engram_interp.models.config import StrictModel
from engram_interp.training.config import ConfigError, parse_config

C = TypeVar("C", bound=StrictModel)


class StudyConfig(StrictModel):
    """What every study has. Unknown keys are errors.

    `model`: a bundled name or a model directory, `base`: that of an adapter's base model; `items` per task, null for
    every one there is; `fit_texts` documents of `fit_corpus` (in the data folder) fit the statistics, or bundled
    sentences when there is no data folder; `loss_texts` held-out documents of `loss_corpus` are scored as text. `data`
    may be given on the command line and is not part of a run's identity: its texts are, by hash. `workers` processes of
    one thread each make the shards (no part of the identity: the bytes are the same); `threads` is for large models in
    one process.
    """

    model: str = "mini-engram"
    base: str | None = None
    tasks: tuple[str, ...] = Field(("gallery_entity", "gallery_phrase", "induction", "arithmetic"), min_length=1)
    items: int | None = Field(500, ge=2)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    data: Path | None = Field(None, strict=False)
    fit_corpus: str = "enwiki_2015_core.train-0.jsonl.zst"
    fit_texts: int = Field(64, ge=1)
    loss_corpus: str = "enwiki_2015_core.heldout.jsonl.zst"
    loss_texts: int = Field(0, ge=0)
    batch_tokens: int = Field(4096, ge=1)
    threads: int = Field(1, ge=1)
    workers: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _one_thread_per_worker(self) -> StudyConfig:
        if self.workers > 1 and self.threads > 1:
            raise ValueError(f"expected threads: 1 with workers: {self.workers}, found threads: {self.threads}")
        return self


def changed(config: C, **changes: object) -> C:
    """The configuration with what was given (not None) in place, checked again.

    Raises: ConfigError naming the bad value.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    return parse_config(type(config), config.model_dump() | given, "command line")


def load_study_config(kind: type[C], path: Path) -> C:
    """Read a study from YAML.

    Raises: ConfigError naming the file and every bad or unknown key.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    return parse_config(kind, {} if raw is None else raw, str(path))
