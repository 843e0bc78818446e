"""What must a model offer so that every probe can ask it questions?

`Decoder` is enough for the lens and CKA; `MemoryModel` adds the memory. Adapters of other people's models implement
these with the same hook names as the house model, so a probe never asks where a model came from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from tokenizers import Tokenizer
from transformer_lens import ActivationCache
from transformer_lens.hook_points import HookPoint

from engram_interp.shapes import Float, Int64, Tensor

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a result came from: name, SHA-256 of the weights, where it was opened, what kind it is."""

    name: str
    weights_sha256: str
    source: str
    kind: str


@runtime_checkable
class TokenisedModel(Protocol):
    """Enough to turn a text into ids: what a memory opened without its backbone can still do."""

    @property
    def identity(self) -> ModelIdentity:
        """Which model this is."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the model was trained with."""
        ...

    def to_tokens(self, text: str) -> Int64[Tensor, "1 T"]:
        """Encode one text as the model was trained to see it."""
        ...


@runtime_checkable
class Decoder(Protocol):
    """A causal language model that can be read layer by layer.

    Residual sites: 0 is the embedding output, i is after block i; `layers + 1` of them. Streams are always an axis, M =
    1 for a plain residual.
    """

    @property
    def identity(self) -> ModelIdentity:
        """Which model this is."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the model was trained with."""
        ...

    @property
    def hook_dict(self) -> Mapping[str, HookPoint]:
        """Every hook point by name."""
        ...

    @property
    def lock(self) -> AbstractContextManager[None]:
        """Re-entrant; held by every forward and while hooks are attached."""
        ...

    @property
    def layers(self) -> int:
        """Number of blocks."""
        ...

    @property
    def width(self) -> int:
        """D, width of one stream."""
        ...

    @property
    def vocab_size(self) -> int:
        """V."""
        ...

    @property
    def context(self) -> int:
        """Longest text in tokens, the first special token included."""
        ...

    def to_tokens(self, text: str) -> Int64[Tensor, "1 T"]:
        """Encode one text as the model was trained to see it; position 0 is the model's start token, if it has one."""
        ...

    def to_str_tokens(self, tokens: Int64[Tensor, " T"]) -> list[str]:
        """Decode each token by itself."""
        ...

    def __call__(self, tokens: Int64[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits."""
        ...

    def residuals(self, tokens: Int64[Tensor, "B T"]) -> list[Float[Tensor, "B T M D"]]:
        """The streams at every residual site, one forward."""
        ...

    def resume(
        self, tokens: Int64[Tensor, "B T"], hidden: Float[Tensor, "B T M D"], block: int
    ) -> Float[Tensor, "B T M D"]:
        """The streams after the last block, given those before `block`; a model that cannot begin there runs whole.

        Bit for bit `residuals(tokens)[-1]` when `hidden` is `residuals(tokens)[block]` and no hook acts before `block`.
        """
        ...

    def reduce_streams(self, hidden: Float[Tensor, "B T M D"]) -> Float[Tensor, "B T D"]:
        """The model's own read-out of its streams into one vector, before the final norm."""
        ...

    def exit_hidden(self, hidden: Float[Tensor, "B T M D"]) -> Float[Tensor, "B T D"]:
        """What the unembedding reads: the model's own stream reduction, then its final norm."""
        ...

    def unembed(self, hidden: Float[Tensor, "*any D"]) -> Float[Tensor, "*any V"]:
        """Logits of exit-ready vectors. `unembed(exit_hidden(residuals[-1]))` is the model's output bit for bit."""
        ...

    def run_with_cache(
        self, tokens: Int64[Tensor, "B T"], names_filter: NamesFilter = None
    ) -> tuple[Float[Tensor, "B T V"], ActivationCache]:
        """Logits and recorded activations; a filter that matches no hook raises KeyError."""
        ...

    def hooks(self, fwd_hooks: list[tuple[str, Callable]]) -> AbstractContextManager[object]:
        """Attach hooks for the duration of a `with`, holding the model's lock."""
        ...


@runtime_checkable
class MemoryModel(Decoder, Protocol):
    """A decoder with Engram layers, hooked as `blocks.{i}.hook_engram_out` and
    `blocks.{i}.engram.hook_{slots,embedding,key, value,score,gate,gated_value,conv_out}`.
    """

    @property
    def engram_layers(self) -> tuple[int, ...]:
        """0-based blocks with a memory, ascending."""
        ...

    def engram(self, block: int) -> object:
        """The memory module of a block (an `engram_interp.memory.Engram` wherever its weights fit one)."""
        ...
