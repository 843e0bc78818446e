"""What does reading another library's decoder need? A tap on a module, a layer's hook points, a tokenizer, a hash.

A tap is a torch hook over a module's first input or output that exists only inside `attached`; a layer's hook points
are tapped only when somebody hooked them, so an idle adapter runs the wrapped model untouched. Misleads: a layer that
calls its parts other than as modules gives them no hook point.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import nn
from transformer_lens.hook_points import HookPoint

from engram_interp.shapes import Tensor

_SUBLAYERS = {
    "attn": ("self_attn", "attn", "attention", "linear_attn"),
    "mlp": ("mlp", "block_sparse_moe", "feed_forward"),
}


class AdapterError(ValueError):
    """A model that cannot be read as a decoder; the message says what was expected and what was found."""


def state_hash(model: nn.Module) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor of a model's state, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Text:
    """A tokenizer, Rust or wrapped."""

    def __init__(self, tokenizer: object) -> None:
        rust = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(rust, Tokenizer):
            raise AdapterError(f"expected a fast tokenizer, found {type(tokenizer).__name__}")
        self.rust, self._wrapped = rust, None if rust is tokenizer else tokenizer

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the special tokens the tokenizer adds; none for an empty text."""
        if not text:
            return []
        return list(self._wrapped(text)["input_ids"]) if self._wrapped is not None else self.rust.encode(text).ids  # type: ignore[operator]


def sublayers(layer: nn.Module) -> dict[str, nn.Module]:
    """The attention (`attn`) and the MLP or experts (`mlp`) of a layer, as far as it has them under a known name."""
    candidates = {part: [getattr(layer, name, None) for name in names] for part, names in _SUBLAYERS.items()}
    found = {part: next((m for m in modules if isinstance(m, nn.Module)), None) for part, modules in candidates.items()}
    return {part: module for part, module in found.items() if module is not None}


class BlockHooks(nn.Module):
    """The hook points of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.hook_resid_pre = HookPoint()
        for part in sublayers(layer):
            setattr(self, f"hook_{part}_out", HookPoint())
        self.hook_resid_post = HookPoint()

    def taps(self, layer: nn.Module) -> Iterator[Tap]:
        """One tap for every hook point that somebody hooked."""
        for point, before in ((self.hook_resid_pre, True), (self.hook_resid_post, False)):
            if _hooked(point):
                yield Tap(layer, lambda value, point=point: point(value.unsqueeze(2)).squeeze(2), before=before)
        for part, module in sublayers(layer).items():
            if _hooked(point := getattr(self, f"hook_{part}_out")):
                yield Tap(module, point)


def _hooked(point: HookPoint) -> bool:
    return bool(point._forward_hooks or point._backward_hooks or point._backward_pre_hooks)


@dataclass(frozen=True)
class Tap:
    """A function over a module's first input or output; what it returns (unless None) replaces the value."""

    module: nn.Module
    function: Callable[[Tensor], Tensor | None]
    before: bool = False

    def attach(self) -> object:
        """Register the torch hook; gives the handle that removes it."""
        if self.before:
            return self.module.register_forward_pre_hook(self._pre, with_kwargs=True)
        return self.module.register_forward_hook(self._post)

    def _pre(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        value = args[0] if args else kwargs["hidden_states"]
        replaced = self.function(value)
        if replaced is None:
            return None
        return ((replaced, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": replaced})

    def _post(self, module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        replaced = self.function(output[0] if isinstance(output, tuple) else output)
        if replaced is None:
            return None
        return (replaced, *output[1:]) if isinstance(output, tuple) else replaced


@contextmanager
def attached(taps: Sequence[Tap]) -> Iterator[None]:
    """Keep taps on their modules for the duration of a `with`."""
    with ExitStack() as stack:
        for tap in taps:
            handle: AbstractContextManager = tap.attach()  # type: ignore[assignment]
            stack.enter_context(handle)
        yield


def logit_scales(config: object) -> Iterator[Callable[[Tensor], Tensor]]:
    """From the head's output to logits, as the known architectures do it: nothing, a soft cap, a scale."""
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        yield lambda logits: torch.tanh(logits / cap) * cap
    else:
        yield lambda logits: logits
    for key in ("logits_scaling", "logit_scale"):
        factor = getattr(config, key, None)
        if factor and factor != 1:
            yield lambda logits, factor=factor: logits / factor
            yield lambda logits, factor=factor: logits * factor
