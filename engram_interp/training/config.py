"""What is one training run? A strict YAML file: the model, the tokens, the schedule, the seed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, TypeVar

import yaml
from pydantic import Field, ValidationError

from engram_interp.models.config import ModelConfig, StrictModel

T = TypeVar("T", bound=StrictModel)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key."""


class TrainConfig(StrictModel):
    """A run. Paths are relative to the working directory; `tokens` counts trained positions.

    `table_lr_factor` multiplies the learning rate of Engram tables, which have no weight decay (paper section 4.1: 5,
    0). `precision` "bfloat16" rounds the operands of matrix products; weights, residual streams, norms, gates and the
    optimiser stay in float32.
    """

    model: ModelConfig
    tokenizer: Path = Field(strict=False)
    train_tokens: Path = Field(strict=False)
    held_out_tokens: Path | None = Field(None, strict=False)
    out: Path = Field(strict=False)
    tokens: int = Field(ge=1)
    batch: int = Field(8, ge=1)
    learning_rate: float = Field(3e-3, gt=0)
    final_lr_fraction: float = Field(0.1, ge=0, le=1)
    warmup_steps: int = Field(100, ge=0)
    table_lr_factor: float = Field(5.0, gt=0)
    table_std: float = Field(0.02, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = Field(1.0, gt=0)
    balance_weight: float = Field(1e-2, ge=0)
    seed: int = 0
    threads: int = Field(1, ge=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = True
    save_every: int = Field(250, ge=1)
    evaluate_every: int = Field(500, ge=1)
    evaluate_rows: int = Field(64, ge=1)
    monitor_every: int = Field(100, ge=1)

    @property
    def tokens_per_step(self) -> int:
        """Trained positions in one step."""
        return self.batch * self.model.context

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return -(-self.tokens // self.tokens_per_step)


class _Yaml(yaml.SafeLoader):
    """Safe YAML in which `3e-3` is a number, as in YAML 1.2 and JSON; PyYAML alone reads a string."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$"), list("-+.0123456789")
)


def load_train_config(path: Path) -> TrainConfig:
    """Read a run from YAML.

    Raises: ConfigError naming the file and every bad or unknown key.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Yaml)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    return parse_config(TrainConfig, raw, str(path))


def parse_config(kind: type[T], raw: object, where: str) -> T:
    """Validate plain data as a strict configuration.

    Raises: ConfigError with one line that names each offending key.
    """
    try:
        return kind.model_validate(_tuples(raw))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}, found {e['input']!r:.60}" for e in error.errors()
        )
        raise ConfigError(f"{where}: {problems}") from None


def _tuples(raw: object) -> object:
    """YAML and JSON have lists only; strict validation wants the tuples that frozen configurations hold."""
    if isinstance(raw, list):
        return tuple(map(_tuples, raw))
    if isinstance(raw, dict):
        return {key: _tuples(value) for key, value in raw.items()}
    return raw
