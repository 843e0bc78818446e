"""A memory's addresses and rows as pictures: collisions, loads, Zipf curve, norms, neighbours, promoted tokens, changed
rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
from jaxtyping import Int64

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

# Okabe-Ito; the second cue is named beside each use.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#E69F00", "#009E73", "#666666"
_COLOURS = (_BLUE, _ORANGE, _GREEN, "#CC79A7", "#56B4E9", "#D55E00")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def collision_figure(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Share of n-grams that share a slot, per head (`order`, `head`, `ngrams`, `colliding`, `expected_colliding`)."""
    import plotly.graph_objects as go

    labels = [f"{order}-gram, head {head}" for order, head in zip(table["order"], table["head"], strict=True)]
    figure = go.Figure(
        [
            go.Bar(x=labels, y=table["colliding"] / table["ngrams"], name="observed", marker_color=_BLUE),
            go.Scatter(
                x=labels,
                y=table["expected_colliding"] / table["ngrams"],
                name="uniform hash",
                mode="markers",
                marker={"color": _ORANGE, "symbol": "line-ew-open", "size": 14, "line": {"width": 3}},
            ),
        ]
    )
    figure.update_layout(
        title=f"Which n-grams share a row? {title}", yaxis_title="share of distinct n-grams", yaxis_rangemode="tozero"
    )
    return figure


def load_figure(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Slots by load, mean over heads (`order`, `load`, `observed`, `expected`)."""
    import plotly.graph_objects as go

    figure = go.Figure()
    means = cast("pd.DataFrame", table.groupby(["order", "load"])[["observed", "expected"]].mean()).reset_index()
    for i, (order, rows) in enumerate(means.groupby("order")):
        colour = _COLOURS[i % len(_COLOURS)]
        figure.add_bar(x=rows["load"], y=rows["observed"], name=f"{order}-grams", marker_color=colour)
        figure.add_scatter(
            x=rows["load"],
            y=rows["expected"],
            name=f"{order}-grams, uniform hash",
            line={"color": colour, "dash": _DASHES[1 + i % (len(_DASHES) - 1)]},
        )
    figure.update_layout(
        title=f"How many n-grams does a slot hold? {title}",
        xaxis_title="n-grams in the slot",
        yaxis_title="slots per head",
    )
    return figure


def zipf_figure(
    rank: Int64[np.ndarray, " points"], reads: Int64[np.ndarray, " points"], exponent: float, *, title: str
) -> go.Figure:
    """Reads against rank, both logarithmic, with the fitted line."""
    import plotly.graph_objects as go

    level = np.exp(np.mean(np.log(reads)) + exponent * np.mean(np.log(rank)))
    figure = go.Figure(
        [
            go.Scatter(x=rank, y=reads, name="reads", line={"color": _BLUE}),
            go.Scatter(
                x=rank,
                y=level * rank.astype(float) ** -exponent,
                name=f"rank^-{exponent:.2f}",
                line={"color": _ORANGE, "dash": "dash"},
            ),
        ]
    )
    figure.update_layout(
        title=f"How unevenly are rows read? {title}",
        xaxis={"type": "log", "title": "rank of the row"},
        yaxis={"type": "log", "title": "reads"},
    )
    return figure


def lookup_figure(table: pd.DataFrame, tokens: Sequence[str], *, title: str) -> go.Figure:
    """Row norms: a line per block, order and head, a column per token (columns of `LookupResult.table`)."""
    import plotly.graph_objects as go

    from engram_interp.figures.gatemap import show

    rows = table.assign(
        line=[
            f"block {b} · {o}-gram · head {h}"
            for b, o, h in zip(table["block"], table["order"], table["head"], strict=True)
        ]
    )
    labels = list(dict.fromkeys(rows.sort_values(["block", "order", "head"])["line"]))
    norms = rows.pivot_table(index="line", columns="position", values="norm", sort=False).loc[labels]
    ngrams = rows.pivot_table(index="line", columns="position", values="ngram", aggfunc="first", sort=False).loc[labels]
    figure = go.Figure(
        go.Heatmap(
            z=norms.to_numpy(),
            x=list(norms.columns),
            y=labels,
            zmin=0,
            colorscale="Cividis",
            customdata=ngrams.to_numpy(),
            hovertemplate="%{customdata}<br>%{y}<br>norm %{z:.3f}<extra></extra>",
            colorbar={"title": "row norm"},
        )
    )
    figure.update_layout(
        title=f"What does the memory hold for this text? {title}",
        height=140 + 22 * len(labels),
        xaxis={
            "tickvals": list(norms.columns),
            "ticktext": [show(tokens[int(i)]) for i in norms.columns],
            "tickangle": -60,
        },
        yaxis={"autorange": "reversed"},
    )
    return figure


def promotion_figure(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Logits of promoted and suppressed tokens (`token`, `logit`, `excess`), beside what is the row's own."""
    import plotly.graph_objects as go

    from engram_interp.figures.gatemap import show

    labels = [f"{show(token)} ({i})" for token, i in zip(table["token"], table["token_id"], strict=True)]
    colours = [_BLUE if logit >= 0 else _ORANGE for logit in table["logit"]]
    figure = go.Figure(
        [
            go.Bar(y=labels, x=table["logit"], orientation="h", name="logit", marker_color=colours),
            go.Scatter(
                y=labels,
                x=table["excess"],
                mode="markers",
                name="beyond the head's mean row",
                marker={"color": _GREY, "symbol": "diamond", "size": 9},
            ),
        ]
    )
    figure.update_layout(
        title=f"Which tokens does this row promote? {title}",
        xaxis_title="logit, centred over the vocabulary",
        yaxis_autorange="reversed",
        height=140 + 22 * len(labels),
    )
    return figure


def neighbour_figure(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Cosine of each neighbour (`row`, `cosine`)."""
    import plotly.graph_objects as go

    figure = go.Figure(go.Bar(x=[f"row {row}" for row in table["row"]], y=table["cosine"], marker_color=_BLUE))
    figure.update_layout(title=f"Which rows are alike? {title}", yaxis_title="cosine")
    return figure


def norm_figure(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Quantiles of row norms per head (columns `order`, `head`, `q0`, ... `q1`)."""
    import plotly.graph_objects as go

    labels = [
        f"{order}-gram, head {head}" if order else "table"
        for order, head in zip(table["order"], table["head"], strict=True)
    ]
    figure = go.Figure(
        go.Box(
            x=labels,
            lowerfence=table["q0.01"],
            q1=table["q0.25"],
            median=table["q0.5"],
            q3=table["q0.75"],
            upperfence=table["q0.99"],
            mean=table["mean"],
            marker_color=_BLUE,
            name="1, 25, 50, 75, 99 %",
        )
    )
    figure.update_layout(title=f"How large are the rows? {title}", yaxis_title="norm", yaxis_rangemode="tozero")
    return figure


def diff_figure(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Relative change by row, coloured by cosine (columns of `DiffResult.table`)."""
    import plotly.graph_objects as go

    marker = {"color": table["cosine"], "colorscale": "Cividis", "cmin": -1, "cmax": 1, "colorbar": {"title": "cosine"}}
    figure = go.Figure(go.Scattergl(x=table["row"], y=table["relative"], mode="markers", marker=marker))
    figure.update_layout(title=f"Which rows changed? {title}", xaxis_title="row", yaxis_title="|b - a| / |a|")
    return figure
