"""How is somebody else's decoder read by the same probes?

Any Hugging Face causal language model, or a TransformerLens `TransformerBridge`, becomes a `Decoder` with one residual
stream:

    residual sites = input of the first layer, output of every layer;  exit = final norm, head, the logits' cap or scale

Layers, final norm and head are found by structure, then *checked*: on construction the model runs once, and unless
unembed(exit_hidden(last residual)) is its output bit for bit, it is refused. So an architecture this file does not know
can fail, but never give a lens of something else. The wrapped model is not changed: torch hooks exist only during a
forward that somebody hooked. Cost: none when idle; opening hashes the weights (about 1 s per GB). Misleads: hook values
are what the modules return; in architectures that norm or scale a sublayer's output afterwards that is not what enters
the residual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath

import torch
from tokenizers import Tokenizer
from torch import nn
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.hook_points import HookPoint

from engram_interp.models.adapters.bridge_parts import (
    AdapterError,
    BlockHooks,
    Tap,
    Text,
    attached,
    logit_scales,
)
from engram_interp.models.adapters.bridge_parts import state_hash as state_hash
from engram_interp.models.cache import matching_hooks
from engram_interp.models.checkpoint import TOKENIZER
from engram_interp.models.lock import ModelLock
from engram_interp.models.protocol import ModelIdentity, NamesFilter
from engram_interp.models.text import show_tokens
from engram_interp.shapes import Float, Int64, Tensor

_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f", "ln_final")


@dataclass(frozen=True)
class _Parts:
    """Where a decoder keeps what the probes read."""

    layers: Sequence[nn.Module]
    norm: nn.Module
    head: nn.Module
    scale: Callable[[Tensor], Tensor]  # from the head's output to the logits


class _Adapted:
    """What both wrappers share: text, structure, exit path. Subclasses run the model."""

    identity: ModelIdentity
    lock: ModelLock
    _parts: _Parts
    _text: Text
    _context: int
    _width: int
    _vocab_size: int

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self._parts.layers)

    @property
    def width(self) -> int:
        """D."""
        return self._width

    @property
    def vocab_size(self) -> int:
        """V, the rows of the head (may exceed the tokenizer's)."""
        return self._vocab_size

    @property
    def context(self) -> int:
        """Longest text in tokens."""
        return self._context

    @property
    def tokenizer(self) -> Tokenizer:
        """The Rust tokenizer."""
        return self._text.rust

    def to_tokens(self, text: str) -> Int64[Tensor, "1 T"]:
        """Encode one text with the special tokens the tokenizer puts before it.

        Raises: AdapterError for an empty text, or one longer than the context.
        """
        ids = self._text.encode(text)
        if not ids:
            raise AdapterError("expected a text with at least one token, found an empty text")
        if len(ids) > self.context:
            raise AdapterError(f"expected at most {self.context} tokens, found {len(ids)}")
        return torch.tensor([ids])

    def to_str_tokens(self, tokens: Int64[Tensor, " T"]) -> list[str]:
        """Decode each token by itself."""
        return show_tokens(self._text.rust, tokens.tolist())

    @torch.no_grad()
    def residuals(self, tokens: Int64[Tensor, "B T"]) -> list[Float[Tensor, "B T 1 D"]]:
        """The residual before layer 0 and after every layer; a copy each, M = 1."""
        records: list[Tensor] = []

        def save(value: Tensor) -> None:
            records.append(value.detach().clone().unsqueeze(2))

        taps = [Tap(self._parts.layers[0], save, before=True), *(Tap(layer, save) for layer in self._parts.layers)]
        with self.lock, attached(taps):
            self(tokens)
        return records

    def resume(
        self, tokens: Int64[Tensor, "B T"], hidden: Float[Tensor, "B T 1 D"], block: int
    ) -> Float[Tensor, "B T 1 D"]:
        """The stream after the last block, from a whole forward: a host begins nowhere else."""
        return self.residuals(tokens)[-1]

    def reduce_streams(self, hidden: Float[Tensor, "B T 1 D"]) -> Float[Tensor, "B T D"]:
        """The one stream."""
        return hidden.squeeze(2)

    def exit_hidden(self, hidden: Float[Tensor, "B T 1 D"]) -> Float[Tensor, "B T D"]:
        """The final norm."""
        return self._parts.norm(hidden.squeeze(2))

    def unembed(self, hidden: Float[Tensor, "*any D"]) -> Float[Tensor, "*any V"]:
        """The head, with the model's soft cap or logit scale."""
        return self._parts.scale(self._parts.head(hidden))

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.numel() == 0:
            raise AdapterError("expected at least one token, found an empty text")
        if tokens.shape[1] > self.context:
            raise AdapterError(f"expected at most {self.context} tokens, found {tokens.shape[1]}")
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise AdapterError(f"expected token ids in [0, {self.vocab_size}), found {int(tokens.max())}")

    def _find_exit(self, layers: Sequence[nn.Module], norm: nn.Module, head: nn.Module, config: object) -> None:
        """Choose the logit scale under which the exit path is the model's own, bit for bit.

        Raises: AdapterError when there is none.
        """
        tokens = torch.arange(min(5, self._vocab_size))[None]
        for scale in logit_scales(config):
            self._parts = _Parts(layers, norm, head, scale)
            with torch.no_grad():
                residuals, logits = self.residuals(tokens), self(tokens)
                if len(residuals) == len(layers) + 1 and self.unembed(self.exit_hidden(residuals[-1])).equal(logits):
                    return
        raise AdapterError(
            f"expected {self.identity.name}'s logits to be its head of its final norm of its last layer's output; "
            "they differ, so its lens would not end at its own prediction"
        )


class HuggingFaceDecoder(_Adapted, HookedRootModule):
    """A Hugging Face causal language model as a `Decoder`.

    Hook points: `blocks.{i}.hook_resid_pre`, `hook_resid_post` [B,T,1,D] and, where the layer has such a part,
    `hook_attn_out`, `hook_mlp_out` [B,T,D]. Hooks may replace values.
    """

    def __init__(self, model: nn.Module, tokenizer: object, name: str | None = None) -> None:
        """Wrap a loaded model, which is put in evaluation mode and otherwise left as it is.

        Args: tokenizer: a fast Hugging Face tokenizer, or a `tokenizers.Tokenizer`.
        Raises: AdapterError for weights below float32, a slow tokenizer, or a structure that cannot be read exactly.
        """
        super().__init__()
        _require_float32(model)
        self.model = model.eval()
        self._text = Text(tokenizer)
        self.lock = ModelLock()
        config = model.config.get_text_config()  # type: ignore[union-attr]
        layers, norm, head = _structure(model, config)
        self._context = int(getattr(config, "max_position_embeddings", None) or 2**20)
        self._width, self._vocab_size = int(config.hidden_size), int(config.vocab_size)
        source = PurePath(str(getattr(config, "_name_or_path", ""))).name or "in memory"
        self.identity = ModelIdentity(name or source, state_hash(model), source, "huggingface")
        self.blocks = nn.ModuleList(BlockHooks(layer) for layer in layers)
        self.setup()
        self._find_exit(layers, norm, head, config)

    def forward(self, tokens: Int64[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits of right-padded or unpadded texts.

        Raises: AdapterError for an empty or too long text, or an id outside the vocabulary.
        """
        self._check_tokens(tokens)
        taps = [
            tap
            for layer, points in zip(self._parts.layers, self.blocks, strict=True)
            for tap in points.taps(layer)  # type: ignore[operator]
        ]
        with self.lock, attached(taps):
            return self.model(input_ids=tokens, use_cache=False).logits

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[tuple[str | Callable, Callable]] = (),
        bwd_hooks: Sequence[tuple[str | Callable, Callable]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[HuggingFaceDecoder]:
        """Attach hooks for the duration of a `with`, holding the lock.

        Raises: KeyError with near matches for a name that is no hook point.
        """
        for name, _ in (*fwd_hooks, *bwd_hooks):
            if isinstance(name, str):
                matching_hooks(self.hook_dict, name)
        with self.lock, super().hooks(list(fwd_hooks), list(bwd_hooks), reset_hooks_end, clear_contexts):
            yield self

    def run_with_cache(  # type: ignore[override]
        self, tokens: Int64[Tensor, "B T"], names_filter: NamesFilter = None
    ) -> tuple[Float[Tensor, "B T V"], ActivationCache]:
        """Logits and a copy of what passed each selected hook point."""
        records: dict[str, Tensor] = {}

        def save(value: Tensor, hook: HookPoint) -> None:
            records[str(hook.name)] = value.detach().clone()

        with self.hooks([(name, save) for name in matching_hooks(self.hook_dict, names_filter)]):
            logits = self(tokens)
        return logits, ActivationCache(records, self)


class BridgeDecoder(_Adapted):
    """A TransformerLens `TransformerBridge` as a `Decoder`; hook names and shapes are the bridge's own."""

    def __init__(self, bridge: object, tokenizer: object = None, name: str | None = None) -> None:
        """Wrap a bridge.

        Args: tokenizer: used instead of the bridge's own.
        Raises: AdapterError for a bridge with several residual streams, weights below float32, no tokenizer, or an exit
            path that is not norm and head.
        """
        blocks = list(getattr(bridge, "blocks", ()))
        if not blocks or not all(getattr(b, "hook_out_is_single_residual_stream", True) for b in blocks):
            raise AdapterError("expected a bridge with blocks of one residual stream")
        _require_float32(bridge)  # type: ignore[arg-type]
        self.bridge = bridge
        self._text = Text(tokenizer if tokenizer is not None else bridge.tokenizer)  # type: ignore[attr-defined]
        self.lock = ModelLock()
        cfg = bridge.cfg  # type: ignore[attr-defined]
        self._context, self._width, self._vocab_size = int(cfg.n_ctx), int(cfg.d_model), int(cfg.d_vocab)
        label = PurePath(str(getattr(cfg, "model_name", "") or "bridge")).name
        self.identity = ModelIdentity(name or label, state_hash(bridge), label, "transformer_lens")  # type: ignore[arg-type]
        config = getattr(getattr(bridge, "original_model", None), "config", cfg)
        self._find_exit(blocks, bridge.ln_final, bridge.unembed, config)  # type: ignore[attr-defined]

    @property
    def hook_dict(self) -> Mapping[str, HookPoint]:
        """The bridge's hook points."""
        return self.bridge.hook_dict  # type: ignore[attr-defined]

    def __call__(self, tokens: Int64[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits.

        Raises: AdapterError for an empty or too long text, or an id outside the vocabulary.
        """
        self._check_tokens(tokens)
        with self.lock:
            return self.bridge(tokens, return_type="logits")  # type: ignore[operator]

    @contextmanager
    def hooks(self, fwd_hooks: list[tuple[str, Callable]]) -> Iterator[object]:
        """Attach hooks for the duration of a `with`, holding the lock."""
        with self.lock, self.bridge.hooks(fwd_hooks=fwd_hooks):  # type: ignore[attr-defined]
            yield self

    def run_with_cache(
        self, tokens: Int64[Tensor, "B T"], names_filter: NamesFilter = None
    ) -> tuple[Float[Tensor, "B T V"], ActivationCache]:
        """Logits and the bridge's own cache.

        Raises: KeyError with near matches for a name that is no hook point.
        """
        names = None if names_filter is None else matching_hooks(self.hook_dict, names_filter)
        with self.lock:
            return self.bridge.run_with_cache(tokens, names_filter=names)  # type: ignore[attr-defined]


def load_decoder(path: Path, *, name: str | None = None, device_map: str | None = None) -> HuggingFaceDecoder:
    """Open a Hugging Face model in float32: a local directory of safetensors, or one GGUF file (dequantised).

    Args: device_map: as `load_host`.
    No network. Raises: AdapterError (a ValueError) when there is nothing that can be opened without unpickling, or
        tensors are missing, extra or misshaped.
    """
    from engram_interp.models.adapters.hosted import load_host, load_host_tokenizer, load_wrapped_tokenizer

    if not path.exists():
        raise AdapterError(f"expected a directory with a model or a GGUF file, found none at {path}")
    model = load_host(path, device_map=device_map)
    # The file itself where there is one, as adapters on this model read it: a wrapper may rebuild it by its class.
    tokenizer = load_host_tokenizer(path) if (path / TOKENIZER).is_file() else load_wrapped_tokenizer(path)
    return HuggingFaceDecoder(model, tokenizer, name or path.resolve().stem)


def _require_float32(model: nn.Module) -> None:
    low = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize < 4), None)
    if low is not None:
        raise AdapterError(
            f"expected weights in float32, found {low}: rounded logits move KL by up to 0.15 nats; "
            "load with dtype=torch.float32 or call .float()"
        )


def _structure(model: nn.Module, config: object) -> tuple[list[nn.Module], nn.Module, nn.Module]:
    """The decoder's layers, final norm and head.

    Raises: AdapterError naming what was not found.
    """
    count = config.num_hidden_layers  # type: ignore[attr-defined]
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model  # type: ignore[operator,union-attr]
    stacks = [c for c in decoder.children() if isinstance(c, nn.ModuleList) and len(c) == count]
    norm = next((getattr(decoder, n) for n in _NORMS if isinstance(getattr(decoder, n, None), nn.Module)), None)
    head = model.get_output_embeddings()  # type: ignore[operator]
    for what, found in (("one list of its layers", len(stacks) == 1), ("a final norm", norm), ("an output head", head)):
        if not found:
            raise AdapterError(f"expected {type(decoder).__name__} to hold {what} ({count} layers), found none")
    return list(stacks[0]), norm, head  # type: ignore[return-value]
