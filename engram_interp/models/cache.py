"""What was recorded, and which parts make up the residual stream?

TransformerLens's ActivationCache knows embedding, attention and MLP only; on an Engram model its decomposition silently
lacks the memory's write. This one includes it and sums to the residual: with doubly stochastic stream mixing the mean
over streams is an ordinary residual stream, to which every component adds a known amount.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from transformer_lens import ActivationCache

from engram_interp.shapes import Float, Tensor

if TYPE_CHECKING:
    from engram_interp.models.house import HouseModel
    from engram_interp.models.streams import StreamConnection


def matching_hooks(known: Iterable[str], names: str | Sequence[str] | Callable[[str], bool] | None) -> list[str]:
    """The hook names a filter selects, in model order.

    Raises: KeyError naming the first unmatched name or pattern and the hook points nearest to it.
    """
    known = list(known)
    if names is None:
        return known
    if callable(names):
        chosen = [name for name in known if names(name)]
        if not chosen:
            raise KeyError(f"the filter selects none of the {len(known)} hook points, such as {known[:3]}")
        return chosen
    patterns = [names] if isinstance(names, str) else list(names)
    selected: set[str] = set()
    for pattern in patterns:
        matched = fnmatch.filter(known, pattern)
        if not matched:
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4)
            raise KeyError(f"no hook point matches {pattern!r}; nearest: {', '.join(near) or 'none'}")
        selected.update(matched)
    return [name for name in known if name in selected]


class EngramCache(ActivationCache):
    """Recorded activations of a house model, by hook name or TransformerLens shorthand."""

    model: HouseModel

    def accumulated_resid(self, layer: int | None = None) -> Float[Tensor, "L B T D"]:  # type: ignore[override]
        """The residual (mean over streams) before each block up to `layer`, then after the last one.

        Args: layer: stop before this block; None goes to the end (layers + 1 entries).
        """
        last = self._last(layer)
        sites = [self[f"blocks.{i}.hook_resid_pre"] for i in range(last)]
        end = f"blocks.{last}.hook_resid_pre" if last < self.model.cfg.layers else f"blocks.{last - 1}.hook_resid_post"
        return torch.stack([self.model.reduce_streams(site) for site in (*sites, self[end])])

    def decompose_resid(  # type: ignore[override]
        self, layer: int | None = None, *, return_labels: bool = False
    ) -> Float[Tensor, "C B T D"] | tuple[Float[Tensor, "C B T D"], list[str]]:
        """The parts of the residual (mean over streams) before block `layer` (None: at the exit); they sum to it.

        Labels: `embed`, `{i}_engram_out`, `{i}_attn_out`, `{i}_mlp_out`.
        """
        parts, labels = [self["hook_embed"]], ["embed"]
        for i in range(self._last(layer)):
            block = self.model.blocks[i]
            if block.has_engram:
                parts.append(self.model.reduce_streams(self[f"blocks.{i}.hook_engram_out"]))
                labels.append(f"{i}_engram_out")
            for part in ("attn", "mlp"):
                connection = cast("StreamConnection", getattr(block, f"{part}_stream"))
                parts.append(self[f"blocks.{i}.hook_{part}_out"] * connection.mean_post())
                labels.append(f"{i}_{part}_out")
        stack = torch.stack(parts).detach()
        return (stack, labels) if return_labels else stack

    def _last(self, layer: int | None) -> int:
        layers = self.model.cfg.layers
        if layer is None:
            return layers
        if not 0 <= layer <= layers:
            raise ValueError(f"expected a layer in [0, {layers}], found {layer}")
        return layer

    def _single_stream_only(self, *_: object, **__: object) -> Tensor:
        raise NotImplementedError(
            "this TransformerLens analysis assumes one residual stream and no memory; use decompose_resid, "
            "accumulated_resid or engram_interp.probes instead"
        )

    get_full_resid_decomposition = stack_head_results = stack_neuron_results = _single_stream_only  # type: ignore[assignment]
    logit_attrs = logit_lens = apply_ln_to_stack = _single_stream_only  # type: ignore[assignment]
