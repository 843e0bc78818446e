"""Does reading gates and lens over a corpus cost the same per token however long the corpus is, and how much memory?

`engram-interp corpus` on the first documents of a token file, each size in a process of its own because the most memory a process held
never falls, sizes interleaved over rounds. What is quoted is CPU time per token relative to the smallest size of the same round.
Ratios hold for one thread of one machine; starting Python and opening the model is not in them, what a run does once (hashing the
corpus, the tables at its end) is, and weighs on the smallest size.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from engram_interp.corpus.documents import corpus_sha256
from engram_interp.figures.curve import Curve, curve_figure
from engram_interp.studies import Context, Plan, Report, Shard, Study, StudyConfig, main

if TYPE_CHECKING:
    import pandas as pd

TABLES = ("costs", "ratios")


class Config(StudyConfig):
    """`corpus`: a token file (`engram-interp tokenize`); `documents` of each size, ascending; `per_token` rows kept or not."""

    corpus: Path = Field(strict=False)
    documents: tuple[int, ...] = Field(min_length=2)
    rounds: int = Field(ge=1)
    per_token: bool = False


def plan(context: Context) -> Plan:
    """A shard is one size in one round."""
    config = context.config
    assert isinstance(config, Config)
    shards = [
        Shard(("costs",), f"round-{number}-documents-{documents}", _measured(config, number, documents))
        for number in range(config.rounds)
        for documents in config.documents
    ]
    return Plan(tuple(shards), corpus_sha256(config.corpus))


def _measured(config: Config, number: int, documents: int) -> Callable[[], dict[str, pd.DataFrame]]:
    def shard() -> dict[str, pd.DataFrame]:
        import pandas as pd

        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "engram_interp", "corpus", config.model, "--texts", str(config.corpus)]
            command += [
                "--documents",
                str(documents),
                "--threads",
                str(config.threads),
                "--out",
                f"{folder}/run",
                "--json",
            ]
            command += ["--per-token"] if config.per_token else []
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout)
        row = {"round": number, "documents": documents} | {k: found[k] for k in ("tokens", "cpu_seconds", "peak_bytes")}
        return {"costs": pd.DataFrame([row])}

    return shard


def report(context: Context, frames: dict[str, pd.DataFrame]) -> Report:
    """Cost per token of every size relative to the smallest in the same round, and the most memory held."""
    import pandas as pd

    costs = frames["costs"].assign(per_token=lambda f: f["cpu_seconds"] / f["tokens"])
    by_round = costs.pivot(index="round", columns="tokens", values="per_token")
    ratio = by_round.div(by_round[by_round.columns.min()], axis=0)
    memory = costs.groupby("tokens")["peak_bytes"].max() / 2**20
    rows = [
        {
            "tokens": tokens, "ratio": values.median(), "lowest": values.min(), "highest": values.max(),
            "peak_mb": memory[tokens], "microseconds_per_token": 1e6 * by_round[tokens].median(),
        }
        for tokens, values in ratio.items()
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    figure = curve_figure(
        [Curve(context.model.identity.name, table["ratio"].to_numpy(), table["lowest"].to_numpy(), table["highest"].to_numpy())],
        table["tokens"].tolist(), x_title="tokens", y_title="CPU time per token, smallest = 1", title="Cost of a corpus run",
    )  # fmt: skip
    lines = [
        f"{int(r.tokens):,} tokens: CPU time per token {r.ratio:.2f} [{r.lowest:.2f}, {r.highest:.2f}] of the smallest size's, "
        f"{r.peak_mb:.0f} MB at the most"
        for r in table.itertuples()
    ]
    return Report({"ratios": table}, figure, (*lines, f"median of {len(by_round)} rounds and their range"))


STUDY = Study("corpus_scaling", Config, plan, report)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
