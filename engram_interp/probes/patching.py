"""Does the memory's content carry the answer from one prompt to another?

Activation patching between two prompts that differ in one entity (Zhang & Nanda 2309.16042): run the base prompt with
what the memory computed on the source prompt, at aligned positions. Denoising puts clean into corrupted (is it
enough?), noising corrupted into clean (is it needed?). Metric: logit(clean answer) - logit(corrupted answer) at the
last position, and the fraction of the gap between the prompts that the patch closes. Each stage apart: slots,
embedding, value, gate, gated value, conv, write. Cost: one forward per stage, block and position. Misleads when the
prompts differ in length (positions are then aligned from the end, and attention sees other distances) or when the gap
between them is small (fractions explode: NaN below 1e-4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from engram_interp.hooks.site import Hook, Site
from engram_interp.models.protocol import MemoryModel
from engram_interp.models.text import show_tokens
from engram_interp.runs import Provenance, texts_hash
from engram_interp.shapes import Int64, Tensor

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Direction = Literal["denoise", "noise"]
STAGES = ("slots", "embedding", "key", "value", "score", "gate", "gated_value", "conv", "write")
DEFAULT_STAGES = ("slots", "embedding", "value", "gate", "conv", "write")
ALL = -1
_SMALLEST_GAP = 1e-4


@dataclass(frozen=True)
class PromptPair:
    """Two prompts as tokens, their first answer tokens, and which positions (clean, corrupted) belong together."""

    clean: Int64[Tensor, "1 T"]
    corrupted: Int64[Tensor, "1 T2"]
    answers: tuple[int, int]
    positions: tuple[tuple[int, int], ...]

    def gap(self, model: MemoryModel, tokens: Int64[Tensor, "1 T3"]) -> float:
        """logit(clean answer) - logit(corrupted answer) after the last token."""
        last = model(tokens)[0, -1]
        return float(last[self.answers[0]] - last[self.answers[1]])

    def sides(self, direction: Direction) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        """Base tokens, source tokens, and (base, source) positions."""
        if direction == "denoise":
            return self.corrupted, self.clean, [(b, a) for a, b in self.positions]
        return self.clean, self.corrupted, list(self.positions)


def prompt_pair(
    model: MemoryModel,
    clean: str,
    corrupted: str,
    answers: tuple[str, str],
    positions: Sequence[tuple[int, int]] | None = None,
) -> PromptPair:
    """Encode two prompts and align them.

    Args: answers: what follows the clean and the corrupted prompt, with its space; positions: (clean, corrupted) pairs,
        None aligns both from the end, start token excluded.
    Raises: ValueError when the first tokens of the answers are equal, or a position is outside its prompt.
    """
    a, b = model.to_tokens(clean), model.to_tokens(corrupted)
    firsts = tuple(model.tokenizer.encode(text, add_special_tokens=False).ids[:1] for text in answers)
    if firsts[0] == firsts[1] or not all(firsts):
        raise ValueError(f"expected answers that differ in their first token, found {answers[0]!r} and {answers[1]!r}")
    if positions is None:
        shorter = min(a.shape[1], b.shape[1])
        positions = [(a.shape[1] - i, b.shape[1] - i) for i in range(shorter - 1, 0, -1)]
    if not positions or any(not (0 <= i < a.shape[1] and 0 <= j < b.shape[1]) for i, j in positions):
        raise ValueError(
            f"expected positions in [0, {a.shape[1]}) and [0, {b.shape[1]}), at least one; found {list(positions)[:3]}"
        )
    return PromptPair(a, b, (firsts[0][0], firsts[1][0]), tuple((int(i), int(j)) for i, j in positions))


def stage_hook(site: Site, stage: str) -> str:
    """The hook point of a stage.

    Raises: ValueError for an unknown stage.
    """
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}: expected one of {', '.join(STAGES)}")
    return site.write if stage == "write" else site.inside("conv_out" if stage == "conv" else stage)


def transplant(source: Tensor, positions: Sequence[tuple[int, int]]) -> Callable[[Tensor, object], Tensor]:
    """A hook that puts the source's activation at source positions into base positions."""

    def put(value: Tensor, hook: object) -> Tensor:
        out = value.clone()
        for base, taken in positions:
            out[:, base] = source[:, taken]
        return out

    return put


@dataclass(frozen=True, eq=False)
class PatchEffects:
    """`rows`: a row per stage, block and base position; block or position -1 means all together.

    `base_gap`, `source_gap`: the metric on both prompts, in logits; `closed` is (patched - base) / (source - base).
    """

    model: str
    direction: str
    tokens: tuple[str, ...]
    base_gap: float
    source_gap: float
    rows: pd.DataFrame = field(repr=False)
    provenance: Provenance = field(repr=False)

    def table(self) -> pd.DataFrame:
        """Columns stage, block, position, token, gap, effect (logits), closed (fraction)."""
        return self.rows

    def figure(self) -> go.Figure:
        """Change of the logit difference by stage and block over positions."""
        from engram_interp.figures.signed_map import signed_map

        single = self.rows[(self.rows["position"] != ALL) & (self.rows["block"] != ALL)]
        grid = single.pivot(index=["stage", "block"], columns="position", values="effect")
        labels = [f"{stage} @ block {block}" for stage, block in grid.index]
        return signed_map(
            grid.to_numpy(dtype=float), labels, [self.tokens[p] for p in grid.columns],
            title=f"{self.direction}: effect of patching one position", unit="logits",
        )  # fmt: skip

    def as_dict(self) -> dict[str, object]:
        """Plain data."""
        rows = self.rows.astype(object).where(self.rows.notna(), None).to_dict("records")
        head = {"model": self.model, "direction": self.direction, "tokens": list(self.tokens)}
        gaps = {"base_gap": self.base_gap, "source_gap": self.source_gap}
        return {**head, **gaps, "rows": rows, "provenance": self.provenance.as_dict()}


@torch.no_grad()
def patch_memory(
    model: MemoryModel,
    clean: str,
    corrupted: str,
    answers: tuple[str, str],
    *,
    what: Sequence[str] = DEFAULT_STAGES,
    direction: str = "denoise",
    blocks: Sequence[int] | None = None,
    positions: Sequence[tuple[int, int]] | None = None,
) -> PatchEffects:
    """Patch each stage of each memory at each aligned position, at all positions, and in all blocks.

    Args: what: of `STAGES`; the rest as in `prompt_pair`.
    Raises: ValueError for an unknown stage or direction, a block without memory, or prompts that cannot be compared.

    >>> import engram_interp
    >>> from engram_interp.probes import patch_memory
    >>> model = engram_interp.load("mini-engram")
    >>> same = "The capital of France is"
    >>> effects = patch_memory(model, same, same, (" Paris", " Rome"), what=["write"])
    >>> float(effects.table()["effect"].abs().max())  # a prompt's own memory changes nothing
    0.0
    """
    import pandas as pd

    pair, sites = prompt_pair(model, clean, corrupted, answers, positions), _sites(model, blocks)
    base, source, places = pair.sides(_direction(direction))
    names = {(stage, site.block): stage_hook(site, stage) for stage in what for site in sites}
    _, cache = model.run_with_cache(source, list(names.values()))
    base_gap, source_gap = pair.gap(model, base), pair.gap(model, source)
    tokens = tuple(show_tokens(model.tokenizer, base[0].tolist()))

    def row(stage: str, block: int, position: int, chosen: list[tuple[int, int]]) -> dict[str, object]:
        of = [name for (s, b), name in names.items() if s == stage and block in (ALL, b)]
        with model.hooks([(name, transplant(cache[name], chosen)) for name in of]):
            gap = pair.gap(model, base)
        token = "(all)" if position == ALL else tokens[position]
        return _effect(gap, base_gap, source_gap) | {
            "stage": stage,
            "block": block,
            "position": position,
            "token": token,
        }

    rows = [row(stage, b, p[0], [p]) for stage, b in names for p in places]
    rows += [row(stage, b, ALL, places) for stage, b in names]
    rows += [row(stage, ALL, ALL, places) for stage in what] if len(sites) > 1 else []
    frame = pd.DataFrame(rows).loc[:, ["stage", "block", "position", "token", "gap", "effect", "closed"]]
    provenance = _provenance(model, [clean, corrupted, *answers], {"what": list(what), "direction": direction})
    return PatchEffects(model.identity.name, direction, tokens, base_gap, source_gap, frame, provenance)


def _effect(gap: float, base: float, source: float) -> dict[str, object]:
    closed = (gap - base) / (source - base) if abs(source - base) > _SMALLEST_GAP else np.nan
    return {"gap": gap, "effect": gap - base, "closed": closed}


def _direction(direction: str) -> Direction:
    if direction not in ("denoise", "noise"):
        raise ValueError(f"expected direction 'denoise' or 'noise', found {direction!r}")
    return direction  # type: ignore[return-value]


def _sites(model: MemoryModel, blocks: Sequence[int] | None) -> list[Site]:
    chosen = model.engram_layers if blocks is None else tuple(blocks)
    if not chosen or any(b not in model.engram_layers for b in chosen):
        raise ValueError(f"expected blocks with a memory, among {list(model.engram_layers)}; found {list(chosen)}")
    return [Site(model, block) for block in chosen]


def _provenance(model: MemoryModel, texts: Sequence[str], options: dict[str, object]) -> Provenance:
    return Provenance({model.identity.name: model.identity.weights_sha256}, texts_hash(texts), len(texts), options)


@dataclass(frozen=True, eq=False)
class PathEffects:
    """`rows`: per block and cause (gate, key, query), the total effect of patching it and its direct part, in logits.

    direct: through the write and the residual stream alone, later attention, experts and memories held at the base run;
    through_later: total - direct.
    """

    model: str
    direction: str
    base_gap: float
    source_gap: float
    rows: pd.DataFrame = field(repr=False)
    provenance: Provenance = field(repr=False)

    def table(self) -> pd.DataFrame:
        """Columns block, cause, total, direct, through_later."""
        return self.rows


@torch.no_grad()
def path_patch_gate(
    model: MemoryModel,
    clean: str,
    corrupted: str,
    answers: tuple[str, str],
    *,
    direction: str = "denoise",
    blocks: Sequence[int] | None = None,
    positions: Sequence[tuple[int, int]] | None = None,
) -> PathEffects:
    """How much of the gate's effect reaches the logits directly, and is it the query (h) or the key (e) that moves it?

    `gate` patches the gate; `key` only the key under it (the value stays); `query` the score that the source's hidden
    state gives with the base's key.
    Raises: ValueError as `patch_memory`, or when the model lacks the hook points of attention and experts.
    """
    import pandas as pd

    pair, sites = prompt_pair(model, clean, corrupted, answers, positions), _sites(model, blocks)
    base, source, places = pair.sides(_direction(direction))
    base_gap, source_gap = pair.gap(model, base), pair.gap(model, source)
    rows = []
    for site in sites:
        frozen = _freeze_later(model, site.block, base)
        for cause, hook in _causes(model, site, base, source, places).items():
            with model.hooks([hook]):
                total = pair.gap(model, base) - base_gap
                with model.hooks(frozen):
                    direct = pair.gap(model, base) - base_gap
            rows.append(
                {"block": site.block, "cause": cause, "total": total, "direct": direct, "through_later": total - direct}
            )
    provenance = _provenance(model, [clean, corrupted, *answers], {"direction": direction})
    return PathEffects(model.identity.name, direction, base_gap, source_gap, pd.DataFrame(rows), provenance)


def _causes(
    model: MemoryModel, site: Site, base: Tensor, source: Tensor, places: list[tuple[int, int]]
) -> dict[str, Hook]:
    gate, key, score = (site.inside(p) for p in ("gate", "key", "score"))
    hidden = f"blocks.{site.block}.hook_resid_pre"
    _, of_base = model.run_with_cache(base, [key, hidden])
    _, of_source = model.run_with_cache(source, [gate, key, hidden])
    moved = transplant(of_source[hidden], places)(of_base[hidden], None)
    query_score = site.memory.score(moved, of_base[key])  # type: ignore[attr-defined]
    same = [(b, b) for b, _ in places]
    return {
        "gate": (gate, transplant(of_source[gate], places)),
        "key": (key, transplant(of_source[key], places)),
        "query": (score, transplant(query_score, same)),
    }


def _freeze_later(model: MemoryModel, block: int, base: Tensor) -> list[Hook]:
    """Hooks that hold everything after the block's memory at its value on the base run."""
    names = [f"blocks.{i}.hook_{part}_out" for i in range(block, model.layers) for part in ("attn", "mlp")]
    names += [f"blocks.{i}.hook_engram_out" for i in model.engram_layers if i > block]
    if missing := [name for name in names if name not in model.hook_dict]:
        raise ValueError(f"path patching needs the hook point {missing[0]}, which this model does not have")
    _, cache = model.run_with_cache(base, names)
    return [(name, lambda value, hook, kept=cache[name]: kept.expand_as(value)) for name in names]
