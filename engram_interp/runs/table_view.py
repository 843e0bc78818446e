"""How are tables and configurations of several runs put side by side?

An estimate is a numeric column `x` with `x_low` and `x_high` beside it; a row is named by its text columns. Cost: none.
Misleads when runs of different texts or models share a chart: read the manifests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    import pandas as pd


def metrics_of(frame: pd.DataFrame) -> list[str]:
    """Columns that hold an estimate with its interval; a table of `mean`, `low`, `high` has the estimate `mean`.

    Those that no condition changes (the score of the untouched model beside every ablation) come last.
    """
    columns = set(frame.columns)
    names = [str(c) for c in frame.columns if {f"{c}_low", f"{c}_high"} <= columns]
    names = names or [c for c in ("mean", "value", "estimate") if {c, "low", "high"} <= columns]
    return sorted(names, key=lambda name: _is_constant(frame, name))


Bar = tuple[str, Float[np.ndarray, " groups"], Float[np.ndarray, " groups"], Float[np.ndarray, " groups"]]


def pivot_metric(frames: Mapping[str, pd.DataFrame], metric: str) -> tuple[list[Bar], list[str]]:
    """One bar (label, value, low, high) per run and condition, over common groups (the first text column).

    Raises: ValueError when no table has the estimate, or it cannot be named by a text column.
    """
    bars: list[Bar] = []
    groups: list[str] = []
    parts = [(run, frame) for run, frame in frames.items() if metric in frame.columns]
    for run, frame in parts:
        names = _text_columns(frame)
        if not names:
            raise ValueError(f"expected a text column that names the rows of {run!r}, found none")
        groups += [g for g in dict.fromkeys(frame[names[0]].astype(str)) if g not in groups]
        conditions = frame.groupby(names[1], sort=False) if len(names) > 1 else [("", frame)]
        prefix = f"{run} " if len(parts) > 1 else ""
        bars += [(f"{prefix}{label}".strip() or run, *_values(part, names[0], metric)) for label, part in conditions]  # type: ignore[misc]
    if not bars:
        raise ValueError(f"expected a table with the estimate {metric!r}, found none")
    return [(label, *(np.array([v.get(g, np.nan) for g in groups]) for v in values)) for label, *values in bars], groups  # type: ignore[misc]


def _is_constant(frame: pd.DataFrame, name: str) -> bool:
    names = _text_columns(frame)
    return len(names) > 1 and bool((frame.groupby(names[0])[name].nunique(dropna=False) <= 1).all())


def _values(frame: pd.DataFrame, group: str, metric: str) -> list[dict[str, float]]:
    low, high = (f"{metric}_low", f"{metric}_high") if f"{metric}_low" in frame.columns else ("low", "high")
    unique = frame.assign(**{group: frame[group].astype(str)}).drop_duplicates(group).set_index(group)
    return [unique[column].astype(float).to_dict() for column in (metric, low, high)]


def _text_columns(frame: pd.DataFrame) -> list[str]:
    from pandas.api.types import is_numeric_dtype

    preferred = ("task", "what", "quantity", "stratum", "condition", "arm")
    text = [str(c) for c in frame.columns if not is_numeric_dtype(frame[c])]
    return sorted(text, key=lambda c: preferred.index(c) if c in preferred else len(preferred))[:2]


def compare_configs(configs: Mapping[str, Mapping[str, object]]) -> pd.DataFrame:
    """One row per setting in which the configurations differ, one column per run; of a single one, every setting."""
    import pandas as pd

    flat = {run: _flat(config) for run, config in configs.items()}
    keys = sorted({key for settings in flat.values() for key in settings})
    rows = [{"setting": key, **{run: settings.get(key, "") for run, settings in flat.items()}} for key in keys]
    different = [row for row in rows if len(configs) == 1 or len({row[run] for run in flat}) > 1]
    return pd.DataFrame(different, columns=["setting", *flat])


def _flat(value: object, prefix: str = "") -> dict[str, str]:
    if isinstance(value, Mapping):
        parts = [_flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items()]
        return {k: v for part in parts for k, v in part.items()}
    return {prefix: str(value)}
