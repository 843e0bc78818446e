"""Take the memory away, in one of the ways that "remove Engram" can mean.

"Removing" is a family: each kind answers another question, and zero ablation alone does not show that the memory holds
a fact (a random vector of equal norm does three quarters of the damage of a zero on a toy). `KINDS` names them all;
report at least zero, mean, resample, permuted hash, equal norm, and a control matched on size. Effects are totals:
later layers may repair. Built on hook points alone, so it works on every `MemoryModel`. Cost: none beside the forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from engram_interp.hooks import controls, gate_kinds, row_kinds, write_kinds
from engram_interp.hooks.site import AblationError, Hook, Kind, Site
from engram_interp.hooks.statistics import MemoryStatistics
from engram_interp.models.protocol import Decoder
from engram_interp.shapes import Tensor

KINDS: dict[str, Kind] = {
    kind.name: kind for module in (write_kinds, gate_kinds, row_kinds, controls) for kind in module.KINDS
}


@contextmanager
def ablate(
    model: Decoder,
    kind: str,
    *,
    blocks: Sequence[int] | None = None,
    positions: Tensor | None = None,
    branches: Sequence[int] | None = None,
    statistics: MemoryStatistics | None = None,
    **options: object,
) -> Iterator[Decoder]:
    """Change what the memory does inside a `with`, holding the model's lock; nest it to combine kinds.

    Args: kind: a name in `KINDS`; blocks: 0-based, None for every block with a memory; positions: True where to act,
        [T] or [B, T]; branches: residual streams to act on; statistics: from `collect_memory_statistics`, for the kinds
        that need data; options: those of the kind, such as scale=0.5 (gate_scale), order=2 (keep_order), bits=4
        (quantise).
    Raises: AblationError (a ValueError) for an unknown kind, block, branch or option, or a missing one.

    >>> import engram_interp
    >>> model = engram_interp.load("mini-engram")
    >>> tokens = model.to_tokens("Alexander the Great")
    >>> before = model(tokens)
    >>> with engram_interp.ablate(model, "output_zero"):
    ...     bool((model(tokens) == before).all())
    False
    >>> bool((model(tokens) == before).all())  # nothing is left behind, to the last bit
    True
    """
    with model.hooks(ablation_hooks(model, kind, blocks, positions, branches, statistics, options)):
        yield model


def ablation_hooks(
    model: Decoder,
    kind: str,
    blocks: Sequence[int] | None,
    positions: Tensor | None,
    branches: Sequence[int] | None,
    statistics: MemoryStatistics | None,
    options: dict[str, object],
) -> list[Hook]:
    """The (hook name, function) pairs of an ablation; see `ablate`."""
    if kind not in KINDS:
        raise AblationError(f"unknown kind {kind!r}: expected one of {', '.join(KINDS)}")
    chosen = KINDS[kind]
    if branches is not None and not chosen.branched:
        raise AblationError(f"kind {kind!r} acts where the branches are still one; expected branches=None")
    if positions is not None and (positions.dtype != torch.bool or positions.ndim not in (1, 2)):
        raise AblationError(f"expected a boolean mask [T] or [B, T], found {positions.dtype} {list(positions.shape)}")
    arguments = _arguments(chosen, statistics, options)
    of_branches = None if branches is None else tuple(branches)
    return [
        hook
        for block in _blocks(model, chosen, blocks)
        for hook in chosen.build(Site(model, block, positions, of_branches), **arguments)
    ]


def _blocks(model: Decoder, kind: Kind, blocks: Sequence[int] | None) -> tuple[int, ...]:
    memories = tuple(getattr(model, "engram_layers", ()))
    allowed = range(model.layers) if kind.name in {k.name for k in controls.KINDS} else memories
    chosen = memories if blocks is None else tuple(blocks)
    if not chosen:
        raise AblationError(
            f"expected a model with a memory or blocks=[...], found {model.identity.name!r} without one"
        )
    if bad := [b for b in chosen if b not in allowed]:
        raise AblationError(f"block {bad[0]} cannot be ablated by {kind.name!r}; expected blocks among {list(allowed)}")
    return chosen


def _arguments(kind: Kind, statistics: MemoryStatistics | None, options: dict[str, object]) -> dict[str, object]:
    parameters = {n: p for n, p in inspect.signature(kind.build).parameters.items() if n != "site"}
    takes = [name for name in parameters if name != "statistics"]
    if unknown := sorted(set(options) - set(takes)):
        raise AblationError(f"kind {kind.name!r} has no option {unknown[0]!r}; it takes {', '.join(takes) or 'none'}")
    required = [n for n in takes if parameters[n].default is inspect.Parameter.empty]
    if missing := [name for name in required if name not in options]:
        raise AblationError(f"kind {kind.name!r} needs the option {missing[0]!r}")
    if "statistics" not in parameters:
        return options
    if statistics is None and kind.needs:
        raise AblationError(f"kind {kind.name!r} needs statistics=collect_memory_statistics(model, texts), found none")
    return {**options, "statistics": statistics}
