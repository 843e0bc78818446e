"""What does a token read from earlier tokens?

Causal multi-head attention with rotary positions (RoPE). Keys and values may be remembered for decoding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint

from engram_interp.models.causal_products import causal_attention
from engram_interp.shapes import Float, Tensor


@dataclass
class AttentionState:
    """Keys and values of the tokens so far, [B, heads, seen, head]; None before the first."""

    key: Tensor | None = None
    value: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values and return all of them."""
        if self.key is not None and self.value is not None:
            key, value = torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)
        self.key, self.value = key, value
        return key, value

    @property
    def seen(self) -> int:
        """Tokens remembered."""
        return 0 if self.key is None else self.key.shape[2]


def rotary_table(context: int, head_width: int, theta: float) -> Float[Tensor, "2 context half"]:
    """Cosines and sines of every position and frequency."""
    frequency = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angle = torch.outer(torch.arange(context, dtype=torch.float64), frequency)
    return torch.stack([angle.cos(), angle.sin()]).float()


def rotate(x: Float[Tensor, "B H T head"], rotary: Float[Tensor, "2 T half"]) -> Float[Tensor, "B H T head"]:
    """Turn each pair (x_i, x_{i + half}) by its position's angle."""
    cos, sin = rotary.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Causal self-attention; hooks see queries, keys (rotated) and values as [B, T, heads, head]."""

    def __init__(self, width: int, heads: int, context: int, theta: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.rotary: Tensor
        self.register_buffer("rotary", rotary_table(context, width // heads, theta), persistent=False)
        self.hook_q = HookPoint()
        self.hook_k = HookPoint()
        self.hook_v = HookPoint()
        self.hook_z = HookPoint()

    def forward(self, x: Float[Tensor, "B T D"], state: AttentionState | None = None) -> Float[Tensor, "B T D"]:
        """Attend to the text so far."""
        seen, length = (state.seen if state else 0), x.shape[1]
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        rotary = self.rotary[:, seen : seen + length]
        q = self.hook_q(rotate(q, rotary).transpose(1, 2)).transpose(1, 2)
        k = self.hook_k(rotate(k, rotary).transpose(1, 2)).transpose(1, 2)
        v = self.hook_v(v.transpose(1, 2)).transpose(1, 2)
        if state:
            k, v = state.extend(k, v)
        if q.dtype is torch.bfloat16 and q.device.type == "cpu" and not seen:
            z = causal_attention(q, k, v)
        elif seen:
            mask = torch.ones(length, seen + length, dtype=torch.bool, device=x.device).tril(seen)
            z = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(self.hook_z(z.transpose(1, 2)).flatten(-2))
