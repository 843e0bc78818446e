"""How does the loss fall with the number of rows, the rest fixed?

Rows from a quarter to 32 times the vocabulary a head (paper section 3.2, figure 3 right: -0.028 nats per factor of ten). The answer
is the slope of nats per token against log10 of the rows, per article and then averaged, so that its interval is over articles; it
agrees with the paper in kind when the interval lies below 0. Costs 8 runs of 1 M tokens a seed;
`experiments/README.md` has the hours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from engram_interp.figures.curve import Curve, curve_figure
from engram_interp.measure.statistics import Estimate, mean_interval
from engram_interp.studies.commands import training_main
from engram_interp.studies.training_study import TrainingStudy, TrainingStudyConfig, Variant

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from engram_interp.training.config import TrainConfig

TABLES = ("articles", "runs")
PAPER_SLOPE = -0.0284


class Config(TrainingStudyConfig):
    """`multiples`: rows of every head in units of the vocabulary, ascending."""

    multiples: tuple[float, ...] = Field(min_length=3)


def variants(config: TrainingStudyConfig, base: TrainConfig) -> tuple[Variant, ...]:
    """One table size each."""
    assert isinstance(config, Config)
    assert base.model.engram is not None
    orders = len(base.model.engram.rows_per_head)
    return tuple(
        Variant(name=f"rows-x{m:g}", change={"model.engram.rows_per_head": [round(m * base.model.vocab_size)] * orders})
        for m in config.multiples
    )


def slope(articles: pd.DataFrame, multiples: tuple[float, ...]) -> Estimate:
    """Nats per token and factor of ten in rows, with an interval over articles."""
    x = np.log10(multiples)
    loss = articles.pivot(index="article", columns="variant", values="loss")[[f"rows-x{m:g}" for m in multiples]]
    tokens = articles.groupby("article")["tokens"].first().loc[loss.index].to_numpy()
    per_token = loss.to_numpy() / tokens[:, None]
    slopes = (per_token - per_token.mean(1, keepdims=True)) @ (x - x.mean()) / np.square(x - x.mean()).sum()
    return mean_interval(slopes * tokens / tokens.mean(), loss.index.to_numpy().astype(str))


def conclude(config: TrainingStudyConfig, articles: pd.DataFrame) -> tuple[list[str], go.Figure]:
    """The slope of every seed beside the paper's."""
    assert isinstance(config, Config)
    lines, curves = [], []
    for seed, part in articles.groupby("seed"):
        found = slope(part, config.multiples)
        agrees = "below 0, as in the paper" if found.high < 0 else "not below 0: it disagrees with the paper"
        lines.append(f"seed {seed}: {found} nats per token and factor of ten in rows ({agrees}; paper {PAPER_SLOPE})")
        total = part.groupby("variant", sort=False)[["loss", "tokens"]].sum()
        curves.append(Curve(f"seed {seed}", (total["loss"] / total["tokens"]).to_numpy()))
    x = np.log10(config.multiples)
    line = np.mean([c.mean.mean() for c in curves]) + PAPER_SLOPE * (x - x.mean())
    figure = curve_figure(
        [*curves, Curve("slope of the paper", line)], x.tolist(), title="More rows, the rest fixed",
        x_title="log10 of rows a head over vocabulary", y_title="nats per token",
    )  # fmt: skip
    return lines, figure


STUDY = TrainingStudy("table_size", Config, conclude, variants)

if __name__ == "__main__":
    raise SystemExit(training_main(STUDY))
