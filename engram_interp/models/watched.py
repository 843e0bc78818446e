"""How far is a long computation, and how is it stopped?

A `WatchedModel` is a model to every probe; before each forward it calls `tick`, which may count, or raise to stop. It
takes no lock of its own, so other threads use the model between the forwards of a long job, and nothing is attached to
the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from tokenizers import Tokenizer
from transformer_lens import ActivationCache
from transformer_lens.hook_points import HookPoint

from engram_interp.models.protocol import Decoder, ModelIdentity, NamesFilter
from engram_interp.shapes import Float, Int64, Tensor


class WatchedModel:
    """Satisfies `Decoder`, and `MemoryModel` where the model inside does.

    Raises (on a forward): whatever `tick` raises.
    """

    def __init__(self, model: Decoder, tick: Callable[[], None]) -> None:
        self._model = model
        self._tick = tick

    def __getattr__(self, name: str) -> object:
        """What the protocol of decoders does not name (`engram_layers`, `engram`, `sites`, ...)."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._model, name)

    @property
    def identity(self) -> ModelIdentity:
        """See `Decoder.identity`."""
        return self._model.identity

    @property
    def tokenizer(self) -> Tokenizer:
        """See `Decoder.tokenizer`."""
        return self._model.tokenizer

    @property
    def hook_dict(self) -> Mapping[str, HookPoint]:
        """See `Decoder.hook_dict`."""
        return self._model.hook_dict

    @property
    def lock(self) -> AbstractContextManager[None]:
        """See `Decoder.lock`."""
        return self._model.lock

    @property
    def layers(self) -> int:
        """See `Decoder.layers`."""
        return self._model.layers

    @property
    def width(self) -> int:
        """See `Decoder.width`."""
        return self._model.width

    @property
    def vocab_size(self) -> int:
        """See `Decoder.vocab_size`."""
        return self._model.vocab_size

    @property
    def context(self) -> int:
        """See `Decoder.context`."""
        return self._model.context

    def to_tokens(self, text: str) -> Int64[Tensor, "1 T"]:
        """See `Decoder.to_tokens`."""
        return self._model.to_tokens(text)

    def to_str_tokens(self, tokens: Int64[Tensor, " T"]) -> list[str]:
        """See `Decoder.to_str_tokens`."""
        return self._model.to_str_tokens(tokens)

    def __call__(self, tokens: Int64[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Tick, then the model's logits."""
        self._tick()
        return self._model(tokens)

    def residuals(self, tokens: Int64[Tensor, "B T"]) -> list[Float[Tensor, "B T M D"]]:
        """Tick, then the model's residuals."""
        self._tick()
        return self._model.residuals(tokens)

    def resume(
        self, tokens: Int64[Tensor, "B T"], hidden: Float[Tensor, "B T M D"], block: int
    ) -> Float[Tensor, "B T M D"]:
        """Tick, then what the model makes of the streams."""
        self._tick()
        return self._model.resume(tokens, hidden, block)

    def reduce_streams(self, hidden: Float[Tensor, "B T M D"]) -> Float[Tensor, "B T D"]:
        """See `Decoder.reduce_streams`."""
        return self._model.reduce_streams(hidden)

    def exit_hidden(self, hidden: Float[Tensor, "B T M D"]) -> Float[Tensor, "B T D"]:
        """See `Decoder.exit_hidden`."""
        return self._model.exit_hidden(hidden)

    def unembed(self, hidden: Float[Tensor, "*any D"]) -> Float[Tensor, "*any V"]:
        """See `Decoder.unembed`."""
        return self._model.unembed(hidden)

    def run_with_cache(
        self, tokens: Int64[Tensor, "B T"], names_filter: NamesFilter = None
    ) -> tuple[Float[Tensor, "B T V"], ActivationCache]:
        """Tick, then the model's records."""
        self._tick()
        return self._model.run_with_cache(tokens, names_filter)

    def hooks(self, fwd_hooks: list[tuple[str, Callable]]) -> AbstractContextManager[object]:
        """See `Decoder.hooks`."""
        return self._model.hooks(fwd_hooks)
