"""How little does removing the memory cost, if the constant put in its place is the best one?

Optimal ablation (Li & Janson, arXiv 2409.09951): one vector per Engram layer, all fitted together, that minimises the
next-token loss of the ablated model. Zero, mean and resampled writes add harm of their own by misleading later layers;
this is the lower bound of what the memory's information is worth. Cost: one forward and backward over the texts per
step. Misleads when fitted on few texts: judge it on others. Starts at the mean write and keeps the best step, so on the
fitted texts it is never worse than mean ablation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from engram_interp.hooks.site import Site
from engram_interp.hooks.statistics import MemoryStatistics
from engram_interp.hooks.write_kinds import replace_write
from engram_interp.models.protocol import MemoryModel
from engram_interp.models.text import windows
from engram_interp.shapes import Float, Int64, Tensor


def fit_optimal_constants(
    model: MemoryModel,
    texts: Sequence[str],
    statistics: MemoryStatistics,
    *,
    blocks: Sequence[int] | None = None,
    steps: int = 30,
    step_size: float = 0.1,
) -> MemoryStatistics:
    """The same statistics with `optimal` filled in for `blocks`.

    Args: blocks: ablated together while fitting, None for all; step_size: of Adam, in units of the mean write's RMS.
    Raises: ValueError for no texts, or a block without statistics.
    """
    chosen = tuple(statistics.blocks) if blocks is None else tuple(blocks)
    if not texts or any(b not in statistics.blocks for b in chosen):
        raise ValueError(
            f"expected texts and blocks among {list(statistics.blocks)}, found {len(texts)} texts, {list(chosen)}"
        )
    tokens = [window.tokens for text in texts for window in windows(model, text)]
    constants = {b: statistics.blocks[b].write_mean.clone().requires_grad_() for b in chosen}
    groups = [
        {"params": [c], "lr": step_size * max(statistics.blocks[b].write_norm, 1e-6) * c.numel() ** -0.5}
        for b, c in constants.items()
    ]
    optimiser = torch.optim.Adam(groups)
    best, best_loss = {b: c.detach().clone() for b, c in constants.items()}, float("inf")
    for _ in range(steps + 1):
        optimiser.zero_grad()
        loss = sum(_backward(model, constants, row, len(tokens)) for row in tokens)
        if loss < best_loss:
            best, best_loss = {b: c.detach().clone() for b, c in constants.items()}, loss
        optimiser.step()
    fitted = {b: replace(s, optimal=best.get(b, s.optimal)) for b, s in statistics.blocks.items()}
    return replace(statistics, blocks=fitted)


def _backward(
    model: MemoryModel, constants: dict[int, Float[Tensor, "streams D"]], tokens: Int64[Tensor, "1 T"], texts: int
) -> float:
    hooks = [hook for block, constant in constants.items() for hook in replace_write(Site(model, block), constant)]
    with torch.enable_grad(), model.hooks(hooks):
        logits = model(tokens)[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.float(), tokens[0, 1:]) / texts
        loss.backward()
    return float(loss.detach())
