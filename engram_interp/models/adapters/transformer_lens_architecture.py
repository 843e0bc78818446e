"""How does a TransformerLens user look into an exported house model?

The architecture of the entry-point group `transformer_lens.architectures`, for `TransformerBridge`. Every bridge
component shows the hook points of the house module it wraps, the very same objects, so names, shapes and values are the
house model's (`blocks.1.engram.hook_gate`, `blocks.1.hook_engram_out`, ...) and nothing is computed twice.

TransformerLens analyses assume one residual stream to which attention and MLP write. So `hook_resid_pre`, `_mid`,
`_post` [B, T, D] exist for M = 1 only; with M streams the block offers `hook_in`, `hook_streams_mid`, `hook_out`
[B, T, M, D], and lens and attribution refuse. `hook_attn_out` and `hook_mlp_out` exist only in a block where they are
all that is written (M = 1, no memory), because `decompose_resid` would silently lack the memory; elsewhere read
`attn.hook_out` and `mlp.hook_out`. Cost: a few idle hook points. Misleads: the bridge changes the wrapped model in
place; use a second copy for engram_interp's own probes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import nn
from transformer_lens.factories.architecture_adapter_factory import (
    SUPPORTED_ARCHITECTURES,
    ArchitectureAdapterFactory,
)
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import EmbeddingBridge, OpaqueBlockBridge, UnembeddingBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from engram_interp.models.adapters.huggingface import EngramHouseForCausalLM, register_huggingface
from engram_interp.shapes import Float, Int64, Tensor

ARCHITECTURE = EngramHouseForCausalLM.__name__


def _show_hook_points(component: GeneralizedComponent, house_module: nn.Module, *names: str) -> None:
    """Put the house module's hook points on its bridge component under their own names."""
    for name, point in list(house_module.named_children()):
        if isinstance(point, HookPoint) and (not names or name in names):
            setattr(component, name, point)


class HousePart(GeneralizedComponent):
    """A part of a house block (norm, attention, experts, memory), run as it is, with its own hook points."""

    def set_original_component(self, original_component: nn.Module) -> None:
        """Wrap the part."""
        super().set_original_component(original_component)
        _show_hook_points(self, original_component)


class HouseUnembedding(UnembeddingBridge):
    """The unembedding, without the zero bias a bridge adds: the product stays the house model's, bit for bit."""

    def set_original_component(self, original_component: nn.Module) -> None:
        """Wrap the head."""
        GeneralizedComponent.set_original_component(self, original_component)


class HouseBlock(OpaqueBlockBridge):
    """A house block; which residual names it offers depends on its streams and memory (see the module)."""

    hook_aliases: dict[str, str | list[str]] = {}  # noqa: RUF012 - TransformerLens reads it from the class
    hook_out_is_single_residual_stream = False

    def set_original_component(self, original_component: nn.Module) -> None:
        """Wrap the block."""
        super().set_original_component(original_component)
        single = original_component.attn_stream.streams == 1
        self.hook_out_is_single_residual_stream = single
        mid = HookPoint()
        setattr(self, "hook_resid_mid" if single else "hook_streams_mid", mid)
        original_component.hook_resid_mid.add_perma_hook(
            lambda value, hook: self._joined(mid(self._residual(value))) if mid.has_hooks(dir="both") else None
        )
        _show_hook_points(self, original_component, "hook_engram_out")
        if single:
            whole = {"hook_attn_out": "attn.hook_out", "hook_mlp_out": "mlp.hook_out"}
            ends = {"hook_resid_pre": "hook_in", "hook_resid_post": "hook_out"}
            self.hook_aliases = ends if original_component.has_engram else {**ends, **whole}

    def forward(
        self, hidden: Float[Tensor, "B T M D"], tokens: Int64[Tensor, "B T"], state: object = None
    ) -> tuple[Float[Tensor, "B T M D"], Float[Tensor, ""]]:
        """The block between `hook_in` and `hook_out`."""
        residual = self._residual(hidden)
        self._check_stop_at_layer(residual)
        block = cast("nn.Module", self.original_component)
        out, balance = block(self._joined(self.hook_in(residual)), tokens, state)
        return self._joined(self.hook_out(self._residual(out))), balance

    def _residual(self, hidden: Tensor) -> Tensor:
        """What hooks see: the one stream [B, T, D], or all of them."""
        return hidden.squeeze(2) if self.hook_out_is_single_residual_stream else hidden

    def _joined(self, residual: Tensor) -> Tensor:
        return residual.unsqueeze(2) if self.hook_out_is_single_residual_stream else residual


class EngramHouseArchitectureAdapter(ArchitectureAdapter):
    """Adapter for `EngramHouseForCausalLM`."""

    applicable_phases: list[int] = []  # noqa: RUF012 - no isolated component harness: parity is tested on whole models
    supports_kv_cache = False  # the wrapped forward keeps no state; generation runs the whole text each step
    supports_batched_generation = False  # pads on the left, which would change n-grams
    supports_compatibility_mode = False  # folds and centres weights as if there were one stream and no memory
    supports_hf_output_attentions = False
    supports_fold_ln = False
    supports_center_writing_weights = False

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        register_huggingface()
        cfg.normalization_type, cfg.uses_rms_norm, cfg.final_rms = "RMS", True, True
        cfg.positional_embedding_type, cfg.gated_mlp, cfg.default_padding_side = "rotary", True, "right"
        self.weight_processing_conversions = {}
        parts = {name: HousePart(name, optional=name == "engram") for name in ("engram", "ln1", "attn", "ln2", "mlp")}
        self.component_mapping = {
            "embed": EmbeddingBridge("model.embed"),
            "blocks": HouseBlock("model.blocks", cfg, parts),
            "ln_final": HousePart("model.ln_final"),
            "unembed": HouseUnembedding("lm_head"),
        }


def register_architecture() -> None:
    """Let `TransformerBridge.boot_transformers(directory)` open exported models; calling it again changes nothing.

    The entry point alone serves `build_bridge_from_module(model, "EngramHouseForCausalLM", hf_config=model.config)`.
    Booting from a directory cannot do without this call: it asks transformers for the configuration, which knows no
    plugins, and then TransformerLens 4.3's own list of architectures, before any entry point is read.
    """
    register_huggingface()
    ArchitectureAdapterFactory.discover_entry_points()
    if ARCHITECTURE not in ArchitectureAdapterFactory._adapters:  # a checkout that is not installed
        ArchitectureAdapterFactory.register_adapter(ARCHITECTURE, EngramHouseArchitectureAdapter)
    SUPPORTED_ARCHITECTURES.setdefault(ARCHITECTURE, EngramHouseArchitectureAdapter)


def open_bridge(directory: Path) -> TransformerBridge:
    """A `TransformerBridge` of a directory written by `export_huggingface`.

    Raises: CheckpointError where `EngramHouseForCausalLM.from_pretrained` does.
    """
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformers import AutoTokenizer

    register_architecture()
    model = EngramHouseForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return build_bridge_from_module(
        model, ARCHITECTURE, hf_config=model.config, tokenizer=tokenizer, model_name=model.config.name
    )
