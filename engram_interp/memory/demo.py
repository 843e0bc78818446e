"""Which of our parameters is which in the published demo?

The reference demo of arXiv 2601.07372 keeps one module per branch (`key_projs.{m}`, `norm1.{m}` for keys, `norm2.{m}`
for queries) and a grouped `Conv1d`; here the branches are an axis. The translation is strict in both directions: a
missing, extra or misshaped tensor is an error, never a silently different layer. Misleads: `norm1` is the key's norm,
`norm2` the query's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from engram_interp.memory.engram import Engram, EngramOptions
from engram_interp.memory.hashing import NgramHash
from engram_interp.shapes import Tensor

OFFSETS = "multi_head_embedding.offsets"
_TABLE = "multi_head_embedding.embedding.weight"
_CONV = "short_conv.conv.weight"


class DemoStateError(ValueError):
    """Weights that do not fit an Engram layer; the message names the tensor, what was expected and what was found."""


def demo_shapes(ngram_hash: NgramHash, options: EngramOptions) -> dict[str, tuple[int, ...]]:
    """The demo's name and shape of every tensor of a layer."""
    slots, m, d = len(ngram_hash.sizes), options.branches, options.width
    memory_width = slots * options.head_width
    shapes: dict[str, tuple[int, ...]] = {OFFSETS: (slots,), _TABLE: (ngram_hash.rows, options.head_width)}
    for name in ("value_proj", *(f"key_projs.{i}" for i in range(m))):
        shapes[f"{name}.weight"] = (d, memory_width)
        if options.biases:
            shapes[f"{name}.bias"] = (d,)
    for norm in ("norm1", "norm2", *(("short_conv.norms",) if options.conv_kernel else ())):
        shapes |= {f"{norm}.{i}.weight": (d,) for i in range(m)}
    if options.conv_kernel:
        shapes[_CONV] = (m * d, 1, options.conv_kernel)
    return shapes


def engram_from_demo(state: Mapping[str, Tensor], ngram_hash: NgramHash, options: EngramOptions) -> Engram:
    """An Engram layer with the weights of a demo layer, in the dtype of its table.

    Args: state: the demo module's own `state_dict()`, tensor by name.
    Raises: DemoStateError for a missing, extra or misshaped tensor, or offsets that belong to another hash.
    """
    _require(state, demo_shapes(ngram_hash, options))
    if (found := state[OFFSETS].tolist()) != list(ngram_hash.offsets):
        raise DemoStateError(f"{OFFSETS}: expected {list(ngram_hash.offsets)}, found {found}")
    layer = Engram(ngram_hash, options).to(state[_TABLE].dtype)
    layer.load_state_dict(_our_names(state, options), strict=True)
    return layer.requires_grad_(False)


def _our_names(state: Mapping[str, Tensor], options: EngramOptions) -> dict[str, Tensor]:
    branches = range(options.branches)
    ours = {
        "table.weight": state[_TABLE],
        "key_norm": torch.stack([state[f"norm1.{i}.weight"] for i in branches]),
        "query_norm": torch.stack([state[f"norm2.{i}.weight"] for i in branches]),
    }
    for part in ("weight", "bias") if options.biases else ("weight",):
        ours[f"value_proj.{part}"] = state[f"value_proj.{part}"]
        ours[f"key_proj.{part}"] = torch.cat([state[f"key_projs.{i}.{part}"] for i in branches])
    if options.conv_kernel:
        ours["conv_norm"] = torch.stack([state[f"short_conv.norms.{i}.weight"] for i in branches])
        ours["conv"] = state[_CONV].reshape(options.branches, options.width, options.conv_kernel)
    return ours


def _require(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    if missing := sorted(set(shapes) - set(state)):
        raise DemoStateError(f"missing {len(missing)} tensors, the first is {missing[0]!r}")
    if extra := sorted(set(state) - set(shapes)):
        raise DemoStateError(f"{len(extra)} unexpected tensors, the first is {extra[0]!r}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise DemoStateError(f"{name}: expected shape {shape}, found {tuple(state[name].shape)}")
