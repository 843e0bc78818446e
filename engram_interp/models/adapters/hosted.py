"""How does a Hugging Face causal language model answer the questions the house model answers?

The host keeps its own code. Every decoder layer gets two PyTorch hooks that pass its streams through
`blocks.{i}.hook_resid_pre` and `blocks.{i}.hook_resid_post` (reshapes alone: no output changes by a bit), and the
exit path is the host's own final norm and head, then its soft cap or scale of the logits. Cost: two views per layer.
Misleads: hidden states are the host's own; a host that scales its embedding or norms a layer's output afterwards has
residuals of another size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import nn
from transformer_lens import ActivationCache
from transformer_lens.hook_points import HookPoint

from engram_interp.memory.gguf_header import read_gguf_header
from engram_interp.memory.row_reader import TableError
from engram_interp.models.adapters.bridge_parts import logit_scales
from engram_interp.models.adapters.hooked import HookedMemory
from engram_interp.models.adapters.host_block import HostBlock
from engram_interp.models.adapters.tensors import AdapterError, TensorFiles
from engram_interp.models.checkpoint import load_tokenizer
from engram_interp.models.protocol import ModelIdentity, NamesFilter
from engram_interp.models.site import EngramSite
from engram_interp.shapes import Float, Int64, Tensor

_FINAL_NORMS = ("hyper_connection_mixer", "norm", "final_layernorm", "ln_f", "final_layer_norm", "norm_f")


@dataclass(frozen=True, eq=False)
class HostLayout:
    """Where a host keeps its layers, final norm and head; `streams` lie side by side in its hidden states."""

    layers: nn.ModuleList
    final_norm: nn.Module
    head: nn.Module
    width: int
    vocab_size: int
    context: int
    streams: int = 1

    @classmethod
    def find(cls, host: nn.Module, container: str | None = None, streams: int = 1) -> HostLayout:
        """Locate the parts of a host.

        Args: container: dotted path of the list of decoder layers; None takes the outermost list of that length.
        Raises: AdapterError naming the part that was not found.
        """
        config = host.config.get_text_config()  # type: ignore[operator, union-attr]
        lists = {name: module for name, module in host.named_modules() if isinstance(module, nn.ModuleList)}
        whole = [name for name in lists if len(lists[name]) == config.num_hidden_layers]
        named = whole if container is None else [name for name in lists if name == container]
        if not named:
            wanted = f"{config.num_hidden_layers} layers" if container is None else f"layers {container!r}"
            raise AdapterError(f"expected a list of {wanted} in the base model, found {sorted(lists)[:5]}")
        path = min(named, key=lambda name: (name.count("."), name))
        parent = host.get_submodule(path.rpartition(".")[0]) if "." in path else host
        norms = [getattr(parent, name) for name in _FINAL_NORMS if isinstance(getattr(parent, name, None), nn.Module)]
        head = host.get_output_embeddings()  # type: ignore[operator]
        if not norms or head is None:
            raise AdapterError(f"expected a final norm beside {path!r} and an output head, found {type(host).__name__}")
        return cls(
            lists[path],
            norms[0],
            head,
            width=config.hidden_size,
            vocab_size=config.vocab_size,
            context=getattr(config, "max_position_embeddings", None) or 2**20,
            streams=streams,
        )


def load_host(path: Path, kind: type | None = None, device_map: str | None = None) -> nn.Module:
    """Load a causal language model in float32: a directory of safetensors, or one GGUF file (dequantised); no code of
    its own, strict.

    Args: device_map: where the weights go, as transformers and accelerate understand it ("auto", "balanced", "cpu", "cuda:1");
        None keeps them on the CPU.
    Raises: AdapterError for anything transformers cannot load, tensors missing, extra or misshaped, or a device_map without the
        package accelerate.
    """
    import transformers

    options: dict[str, object] = {"use_safetensors": True}
    directory = path
    if path.suffix == ".gguf":
        directory, options = path.parent, dict[str, object](gguf_file=path.name)
    if device_map is not None:
        if find_spec("accelerate") is None:
            raise AdapterError(
                f"expected the package accelerate for device_map {device_map!r}, found none: pip install accelerate"
            )
        options["device_map"] = device_map
    _require_files(path)
    kind = kind or transformers.AutoModelForCausalLM
    try:
        with _without_progress_bar():
            host, report = kind.from_pretrained(  # type: ignore[attr-defined]
                directory,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=False,
                **options,
            )
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, ImportError, SafetensorError) as error:
        raise AdapterError(f"{path}: cannot be loaded ({_first_line(error)})") from None
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(problem):
            raise AdapterError(f"{path}: {problem.replace('_', ' ')}: {sorted(map(str, report[problem]))[:3]}")
    if away := [name for name, tensor in host.state_dict().items() if tensor.is_meta]:
        raise AdapterError(
            f"{path}: device_map {device_map!r} left {len(away)} tensors on disk, {away[0]} first; give more memory"
        )
    return host.eval().requires_grad_(False)


def load_host_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model directory (`tokenizer.json`), or the one a GGUF file carries.

    Raises: AdapterError or CheckpointError when there is none that can be read.
    """
    if path.suffix == ".gguf":
        return load_wrapped_tokenizer(path).backend_tokenizer  # type: ignore[attr-defined]
    return load_tokenizer(path)


def load_wrapped_tokenizer(path: Path) -> object:
    """The tokenizer of a directory or GGUF file as transformers wraps it.

    Raises: AdapterError when transformers cannot read one.
    """
    from transformers import AutoTokenizer

    directory, options = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise AdapterError(f"{path}: its tokenizer cannot be read ({_first_line(error)})") from None


def weight_files(path: Path) -> list[Path]:
    """The files that hold a host's weights."""
    return [path] if path.suffix == ".gguf" else sorted(path.glob("*.safetensors"))


def _require_files(path: Path) -> None:
    if path.suffix == ".gguf":
        try:
            read_gguf_header(path)  # damage is one clear error, before transformers reads the file
        except TableError as error:
            raise AdapterError(str(error)) from None
        return
    if not (path / "config.json").is_file():
        raise AdapterError(f"{path}: not a model directory, config.json is missing")
    for file in TensorFiles(path).files:  # refuses indices that point elsewhere
        if not file.is_file():
            raise AdapterError(f"{file}: no such file, the index names it")


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


class HostedModel(HookedMemory):
    """A Hugging Face causal language model behind the `MemoryModel` protocol."""

    def __init__(
        self,
        host: nn.Module,
        layout: HostLayout,
        sites: Sequence[EngramSite],
        tokenizer: Tokenizer,
        identity: ModelIdentity,
    ) -> None:
        super().__init__(sites, tokenizer, identity)
        memories = {site.block: site.engram for site in self.sites}
        self.layout = layout
        self.hook_embed = HookPoint()
        self.blocks = nn.ModuleList(
            HostBlock(memories.get(i), layer, layout.width) for i, layer in enumerate(layout.layers)
        )
        self.setup()
        self.host = host  # after setup, so that no module of the host is renamed
        self._scale: Callable[[Tensor], Tensor] = lambda logits: logits
        self._tokens: Tensor | None = None
        for index, layer in enumerate(layout.layers):
            layer.register_forward_pre_hook(self._entry_of(index), with_kwargs=True)
            layer.register_forward_hook(self._exit_of(index))
            self.blocks[index].attach(layer)  # type: ignore[operator]

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def width(self) -> int:
        """D."""
        return self.layout.width

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.layout.vocab_size

    @property
    def context(self) -> int:
        """Longest text in tokens."""
        return self.layout.context

    @property
    def W_U(self) -> Float[Tensor, "D V"]:  # noqa: N802 - TransformerLens name
        """The unembedding."""
        return self.layout.head.weight.T  # type: ignore[union-attr, return-value]

    def forward(self, tokens: Int64[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits of the next token at every position.

        Raises: ValueError for an empty or too long text, an id outside the vocabulary, or padding before a token.
        """
        self._check_tokens(tokens)
        with self.lock:
            self._tokens = tokens
            try:
                return self.host(input_ids=tokens, use_cache=False).logits
            finally:
                self._tokens = None

    def current_tokens(self) -> Int64[Tensor, "B T"]:
        """The token ids of the forward under way.

        Raises: ValueError outside of one: a host called directly has no ids to give to the memory.
        """
        if self._tokens is None:
            raise ValueError("expected a call of the adapter, found one of its base model; call the adapter instead")
        return self._tokens

    def before_block(self, block: int, hidden: Float[Tensor, "B T M D"]) -> Float[Tensor, "B T M D"]:
        """What an adapter adds before a block with a memory; nothing where the host's own layer does it."""
        return hidden

    def run_with_cache(  # type: ignore[override]
        self, tokens: Int64[Tensor, "B T"], names_filter: NamesFilter = None, *, clone: bool = True
    ) -> tuple[Float[Tensor, "B T V"], ActivationCache]:
        """Logits and the recorded activations.

        Raises: KeyError with near matches when a name matches no hook point.
        """
        logits, records = self._recorded((tokens,), names_filter, clone)
        return logits, ActivationCache(records, self)  # type: ignore[return-value]

    @torch.no_grad()
    def residuals(self, tokens: Int64[Tensor, "B T"]) -> list[Float[Tensor, "B T M D"]]:
        """The streams before block 0 and after every block, from one forward."""
        records: list[Tensor] = []
        sites = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(self.layers))]
        save = lambda value, hook: records.append(value.clone())  # noqa: E731
        with self.hooks(fwd_hooks=[(site, save) for site in sites]):
            self(tokens)
        return records

    def resume(
        self, tokens: Int64[Tensor, "B T"], hidden: Float[Tensor, "B T M D"], block: int
    ) -> Float[Tensor, "B T M D"]:
        """The streams after the last block, from a whole forward: a host begins nowhere else."""
        return self.residuals(tokens)[-1]

    def reduce_streams(self, hidden: Float[Tensor, "B T M D"]) -> Float[Tensor, "B T D"]:
        """The mean over streams (the host's own reduction sits inside its final norm and has no value of its own)."""
        return hidden.mean(2)

    def exit_hidden(self, hidden: Float[Tensor, "B T M D"]) -> Float[Tensor, "B T D"]:
        """What the unembedding reads: the host's own stream reduction and final norm."""
        return self.layout.final_norm(hidden.flatten(-2))

    def unembed(self, hidden: Float[Tensor, "*any D"]) -> Float[Tensor, "*any V"]:
        """Logits of vectors that passed the final norm."""
        return self._scale(self.layout.head(hidden))

    @torch.no_grad()
    def require_own_exit(self) -> None:
        """Choose the cap or scale of the logits under which the exit path is the host's own, bit for bit.

        Raises: AdapterError when there is none: a lens would not end at the host's own prediction.
        """
        padding = self._require_tokenizer().padding or {}
        ids = [token for token in range(min(6, self.vocab_size)) if token != padding.get("pad_id")]
        tokens = torch.tensor([ids])
        residuals, logits = self.residuals(tokens), self(tokens)
        for scale in logit_scales(self.host.config.get_text_config()):  # type: ignore[union-attr, operator]
            self._scale = scale
            if self.unembed(self.exit_hidden(residuals[-1])).equal(logits):
                return
        raise AdapterError(
            f"expected the logits of {type(self.host).__name__} to be its head of its final norm of its last layer's "
            "output; they differ, so its lens would not end at its own prediction"
        )

    def generate(self, tokens: Int64[Tensor, "B T"], new: int) -> Int64[Tensor, "B T2"]:
        """Continue texts of equal length by `new` tokens, greedily, each from the whole text (no cache)."""
        for _ in range(new):
            tokens = torch.cat([tokens, self(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
        return tokens

    def _entry_of(self, block: int):  # noqa: ANN202 - a PyTorch hook
        def enter(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            hidden = args[0] if args else kwargs["hidden_states"]
            if block == 0:
                hidden = self._embedded(hidden)
            points = self.blocks[block]
            streams = points.hook_resid_pre(hidden.unflatten(-1, (self.layout.streams, self.width)))
            if points.has_engram:
                streams = self.before_block(block, streams)
            hidden = streams.flatten(-2)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return enter

    def _embedded(self, hidden: Tensor) -> Tensor:
        """Pass the embedding through `hook_embed`; it is repeated over the streams, as hosts with several do."""
        embedded = self.hook_embed(hidden[..., : self.width])
        return embedded if self.layout.streams == 1 else embedded.repeat(1, 1, self.layout.streams)

    def _exit_of(self, block: int):  # noqa: ANN202 - a PyTorch hook
        def leave(_: nn.Module, __: tuple, output: Tensor | tuple) -> Tensor | tuple:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            streams = self.blocks[block].hook_resid_post(hidden.unflatten(-1, (self.layout.streams, self.width)))
            hidden = streams.flatten(-2)
            return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

        return leave

    def _check_tokens(self, tokens: Int64[Tensor, "B T"]) -> None:
        if tokens.numel() == 0:
            raise ValueError("expected at least one token, found an empty text")
        if tokens.shape[1] > self.context:
            raise ValueError(f"expected at most {self.context} tokens, found {tokens.shape[1]}")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"expected token ids in [0, {self.vocab_size}), found {low if low < 0 else high}")
        padding = self._require_tokenizer().padding
        if padding is not None and self.sites:
            pads = tokens == padding["pad_id"]
            if bool((pads[:, 0] & ~pads.all(dim=1)).any()):
                raise ValueError(
                    f"expected padding (id {padding['pad_id']}) only after the text; found it before a token. "
                    "Left padding changes the n-grams and the convolution: pad on the right"
                )
