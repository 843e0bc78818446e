"""What happens inside one block of the house transformer, and what does it remember while decoding?

Memory (where configured), attention, experts, in this order, each on M residual streams; `house` gives the formula.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint

from engram_interp.memory import Engram, EngramState
from engram_interp.models.attention import Attention, AttentionState
from engram_interp.models.config import ModelConfig
from engram_interp.models.experts import DenseFeedForward, MixtureOfExperts
from engram_interp.models.streams import StreamConnection
from engram_interp.shapes import Float, Int64, Tensor


class RMSNorm(nn.Module):
    """x / rms(x) * gain, with TransformerLens's two hook points."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.w = nn.Parameter(torch.ones(width))
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Normalise the last axis."""
        scale = self.hook_scale((x.square().mean(-1, keepdim=True) + self.eps).sqrt())
        return self.hook_normalized(x / scale) * self.w


class Block(nn.Module):
    """Memory (where configured), attention, experts."""

    def __init__(self, config: ModelConfig, index: int, engram: Engram | None) -> None:
        super().__init__()
        if engram is not None:
            self.engram = engram
            self.hook_engram_out = HookPoint()
        self.has_engram = engram is not None
        self.ln1 = RMSNorm(config.width, config.norm_eps)
        self.attn = Attention(config.width, config.heads, config.context, config.rope_theta)
        self.attn_stream = StreamConnection(config.streams, 2 * index)
        self.ln2 = RMSNorm(config.width, config.norm_eps)
        self.mlp = (
            DenseFeedForward(config.width, config.dense_width)
            if index < config.dense_blocks
            else MixtureOfExperts(
                config.width, config.routed_experts, config.active_experts, config.expert_width, config.shared_width
            )
        )
        self.mlp_stream = StreamConnection(config.streams, 2 * index + 1)
        self.hook_resid_pre = HookPoint()
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(
        self, hidden: Float[Tensor, "B T M D"], tokens: Int64[Tensor, "B T"], state: BlockState | None = None
    ) -> tuple[Float[Tensor, "B T M D"], Float[Tensor, ""]]:
        """The streams after the block, and its load-balance loss."""
        hidden = self.hook_resid_pre(hidden)
        if self.has_engram:
            read = hidden if self.engram.options.branches == hidden.shape[2] else hidden.mean(2, keepdim=True)
            write = self.engram(read, tokens, state.engram if state else None).expand_as(hidden)
            hidden = hidden + self.hook_engram_out(write)
        attn_out = self.attn(self.ln1(self.attn_stream.read(hidden)), state.attention if state else None)
        hidden = self.hook_resid_mid(self.attn_stream.write(hidden, self.hook_attn_out(attn_out)))
        mlp_out, balance = self.mlp(self.ln2(self.mlp_stream.read(hidden)))
        hidden = self.hook_resid_post(self.mlp_stream.write(hidden, self.hook_mlp_out(mlp_out)))
        return hidden, balance


@dataclass
class BlockState:
    """What one block remembers while decoding."""

    attention: AttentionState = field(default_factory=AttentionState)
    engram: EngramState | None = None


@dataclass
class DecodeState:
    """What the model remembers while decoding: keys and values, n-gram windows, conv inputs."""

    blocks: list[BlockState]

    @property
    def seen(self) -> int:
        """Tokens so far."""
        return self.blocks[0].attention.seen
