"""Which hook points does a layer of somebody else's model offer, besides the streams around it?

`hook_attn_out`, `hook_mlp_out` [B, T, D]: what its attention and its MLP or experts return. `hook_resid_mid` [B, T, M,
D]: the streams between the two, where the layer reads them through a mixer of its own (Qwen3.8-Flash-Next).
`mlp.hook_expert_weights` [B, T, k]: the weights of the chosen experts, the most probable first, where the experts are
one module that takes them. Found by structure; what a layer does not have gets no hook point. Cost: a reshape each; no
output changes by a bit. Misleads: in architectures that norm or scale a part's output afterwards, what it returns is
not what enters the streams.
"""

from __future__ import annotations

import inspect

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint

from engram_interp.memory import Engram
from engram_interp.models.adapters.bridge_parts import sublayers
from engram_interp.models.adapters.hooked import HookedBlock
from engram_interp.shapes import Float, Tensor

_MIXER = "mlp_hyper_connection"  # reads the streams between attention and experts


class HostExperts(nn.Module):
    """The hook point of a layer's routed experts."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_expert_weights = HookPoint()


class HostBlock(HookedBlock):
    """The hook points of one layer of a host, and its memory if it has one."""

    def __init__(self, engram: Engram | None, layer: nn.Module, width: int) -> None:
        super().__init__(engram)
        self._width = width
        for part in (parts := sublayers(layer)):
            setattr(self, f"hook_{part}_out", HookPoint())
        if isinstance(getattr(layer, _MIXER, None), nn.Module):
            self.hook_resid_mid = HookPoint()
        if "mlp" in parts and _experts(parts["mlp"]) is not None:
            self.mlp = HostExperts()

    def attach(self, layer: nn.Module) -> None:
        """Pass the layer's values through the hook points from now on."""
        parts = sublayers(layer)
        for part, module in parts.items():
            module.register_forward_hook(self._leave(getattr(self, f"hook_{part}_out")))
        if hasattr(self, "hook_resid_mid"):
            getattr(layer, _MIXER).register_forward_pre_hook(self._enter_mixer)
        if hasattr(self, "mlp"):
            shape: list[torch.Size] = []
            parts["mlp"].register_forward_pre_hook(lambda _, args: shape.append(args[0].shape[:-1]))
            if (experts := _experts(parts["mlp"])) is not None:
                experts.register_forward_pre_hook(lambda _, args: self._weigh(args, shape.pop()))

    def _leave(self, point: HookPoint):  # noqa: ANN202 - a PyTorch hook
        def leave(_: nn.Module, __: tuple, output: Tensor | tuple) -> Tensor | tuple:
            return (point(output[0]), *output[1:]) if isinstance(output, tuple) else point(output)

        return leave

    def _enter_mixer(self, _: nn.Module, args: tuple[Float[Tensor, "B T MD"]]) -> tuple[Tensor]:
        return (self.hook_resid_mid(args[0].unflatten(-1, (-1, self._width))).flatten(-2),)

    def _weigh(self, args: tuple, shape: torch.Size) -> tuple:
        weights = self.mlp.hook_expert_weights(args[2].reshape(*shape, -1))
        return (*args[:2], weights.reshape(args[2].shape), *args[3:])


def _experts(mlp: nn.Module) -> nn.Module | None:
    """The module of transformers' mixtures that is called with states, indices and weights, in this order."""
    experts = getattr(mlp, "experts", None)
    if not isinstance(experts, nn.Module) or isinstance(experts, nn.ModuleList):
        return None
    return experts if list(inspect.signature(experts.forward).parameters)[2:3] == ["top_k_weights"] else None
