"""What does the memory write into the residual stream?

The Engram module, equations 1 to 5 of arXiv 2601.07372 (v1) as its released code computes them:

    e_t      = concat of S table rows                         `hook_embedding`   eq. 2
    k_t^(m)  = W_K^(m) e_t     v_t = W_V e_t                  `hook_key`, `hook_value`
    s_t^(m)  = RMSNorm(h_t^(m)) . RMSNorm(k_t^(m)) / sqrt(D)  `hook_score`
    a_t^(m)  = sigmoid(sign(s) sqrt(max(|s|, 1e-6)))          `hook_gate`        eq. 3, 4; the paper prints sigmoid(s)
    u_t^(m)  = a_t^(m) v_t                                    `hook_gated_value`
    Y        = u + SiLU(Conv(RMSNorm(u)))                     `hook_conv_out`    eq. 5

and the block adds Y to its streams before attention. Misleads: a gate of 0.5 is s = 0, "no evidence", not "half open";
the conv path sees RMSNorm(u), so it is not scaled by the gate and reaches t, t-dilation, t-2 dilation, ...
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint

from engram_interp.memory.hashing import NgramHash
from engram_interp.memory.table import MultiHeadTable
from engram_interp.shapes import Float, Int64, Tensor

GateForm = Literal["signed_root", "signed_root_copysign", "plain", "open"]

_ROOT_FLOOR = 1e-6


@dataclass(frozen=True)
class EngramOptions:
    """The choices in which published Engram layers differ.

    `branches` M; `width` D; `head_width` columns of a table row; `conv_kernel` 0 means no convolution (DeepSeek-V4.1);
    `conv_dilation` defaults to the largest order; `gate_eps` None means the machine epsilon of the dtype (the demo).
    """

    width: int
    branches: int
    head_width: int
    gate: GateForm = "signed_root"
    biases: bool = False
    conv_kernel: int = 4
    conv_dilation: int | None = None
    gate_eps: float | None = None
    conv_eps: float = 1e-5


def gate_of_score(score: Float[Tensor, "*any"], form: GateForm) -> Float[Tensor, "*any"]:
    """The gate in (0, 1) of a score: sigmoid of its signed square root, or of the score itself (`plain`, paper eq. 4).

    `open` is 1 for every score (section 6.2, "without gating").
    The two root forms differ only at s = 0, where `copysign` gives .50025 (V4.1) and `sign` gives .5 (demo, Qwen).
    """
    if form == "plain":
        return torch.sigmoid(score)
    if form == "open":
        return torch.ones_like(score)
    root = score.abs().clamp_min(_ROOT_FLOOR).sqrt()
    if form == "signed_root_copysign":
        return torch.sigmoid(torch.copysign(root, score))
    return torch.sigmoid(root * score.sign())


def rms_normalise(
    x: Float[Tensor, "*any D"], gain: Float[Tensor, "*gain D"], eps: float | None
) -> Float[Tensor, "*any D"]:
    """RMSNorm over the last axis with a gain that broadcasts against it."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


class Engram(nn.Module):
    """One Engram layer: hash, table, branch keys, one shared value, gate, short convolution.

    Parameters: `table.weight` [rows, head]; `value_proj` [D, mem]; `key_proj` [M*D, mem] branch-major; `key_norm`,
    `query_norm`, `conv_norm` gains [M, D]; `conv` [M, D, kernel], last tap = current token.

    >>> import torch
    >>> from engram_interp.memory import CompressedVocabulary, Engram, EngramOptions, NgramHash
    >>> ngram_hash = NgramHash(CompressedVocabulary.identity(10), multipliers=(3, 5), primes=((7, 11),), pad=0)
    >>> engram = Engram(ngram_hash, EngramOptions(width=8, branches=2, head_width=4))
    >>> engram(torch.zeros(1, 3, 2, 8), torch.tensor([[1, 2, 3]])).shape  # [B, T, M, D]
    torch.Size([1, 3, 2, 8])
    """

    def __init__(self, ngram_hash: NgramHash, options: EngramOptions) -> None:
        super().__init__()
        self.ngram_hash = ngram_hash
        self.options = options
        m, d = options.branches, options.width
        self.memory_width = len(ngram_hash.sizes) * options.head_width
        self.table = MultiHeadTable(ngram_hash.rows, options.head_width)
        self.value_proj = nn.Linear(self.memory_width, d, bias=options.biases)
        self.key_proj = nn.Linear(self.memory_width, m * d, bias=options.biases)
        self.key_norm = nn.Parameter(torch.ones(m, d))
        self.query_norm = nn.Parameter(torch.ones(m, d))
        self.dilation = options.conv_dilation or ngram_hash.orders[-1]
        if options.conv_kernel:
            self.conv_norm = nn.Parameter(torch.ones(m, d))
            self.conv = nn.Parameter(torch.zeros(m, d, options.conv_kernel))  # identity at start, paper section 4.1
        self.hook_slots = HookPoint()
        self.hook_embedding = HookPoint()
        self.hook_key = HookPoint()
        self.hook_value = HookPoint()
        self.hook_score = HookPoint()
        self.hook_gate = HookPoint()
        self.hook_gated_value = HookPoint()
        self.hook_conv_out = HookPoint()

    @property
    def conv_history(self) -> int:
        """Positions back that the convolution reads."""
        return (self.options.conv_kernel - 1) * self.dilation if self.options.conv_kernel else 0

    def forward(
        self,
        hidden: Float[Tensor, "B T M D"],
        tokens: Int64[Tensor, "B T"],
        state: EngramState | None = None,
    ) -> Float[Tensor, "B T M D"]:
        """The write Y for every stream.

        Args: hidden: the streams before the layer; tokens: raw ids; state: what decoding remembers, updated in place.
        """
        compressed = self.ngram_hash.compress(tokens)
        mix = self.ngram_hash.mix(compressed, state.window if state else None)
        if state:
            state.remember_window(compressed, self.ngram_hash)
        slots = self.hook_slots(self.ngram_hash.slots_of_mix(mix))
        embedding = self.hook_embedding(self.read(slots))
        # Back to the rows' dtype: training rounds the products, but the gate's machine epsilon is the rows'.
        key = self.key_proj(embedding).to(embedding.dtype).unflatten(-1, (self.options.branches, -1))
        key, value = self.hook_key(key), self.hook_value(self.value_proj(embedding).to(embedding.dtype))
        gate = self.hook_gate(gate_of_score(self.hook_score(self.score(hidden, key)), self.options.gate))
        gated_value = self.hook_gated_value(gate.unsqueeze(-1) * value.unsqueeze(-2))
        if not self.options.conv_kernel:
            return gated_value
        return gated_value + self.hook_conv_out(self.convolve(gated_value, state))

    def read(self, slots: Int64[Tensor, "B T S"]) -> Float[Tensor, "B T mem"]:
        """e_t: the rows of the addressed slots, concatenated."""
        return self.table(self.ngram_hash.rows_of_slots(slots))

    def score(self, hidden: Float[Tensor, "B T M D"], key: Float[Tensor, "B T M D"]) -> Float[Tensor, "B T M"]:
        """s_t: agreement of the stream with the key, in [-sqrt(D), sqrt(D)] for unit gains."""
        eps = self.options.gate_eps
        normed_key = rms_normalise(key, self.key_norm, eps)
        normed_query = rms_normalise(hidden, self.query_norm, eps)
        return (normed_key * normed_query).sum(-1) / math.sqrt(self.options.width)

    def convolve(
        self, gated_value: Float[Tensor, "B T M D"], state: EngramState | None = None
    ) -> Float[Tensor, "B T M D"]:
        """SiLU of the causal, dilated, depthwise convolution of RMSNorm(u)."""
        normed = rms_normalise(gated_value, self.conv_norm, self.options.conv_eps)
        length = normed.shape[1]
        silence = (0, 0, 0, 0, self.conv_history, 0)
        history = nn.functional.pad(normed, silence) if state is None else state.extend_conv(normed)
        taps = [
            history[:, tap * self.dilation : tap * self.dilation + length] * self.conv[..., tap]
            for tap in range(self.options.conv_kernel)
        ]
        return nn.functional.silu(sum(taps[1:], taps[0]))


@dataclass
class EngramState:
    """What one Engram layer remembers between decoding steps: the last compressed ids and the last conv inputs."""

    window: Int64[Tensor, "B W"]
    conv: Float[Tensor, "B history M D"]

    @classmethod
    def start(cls, layer: Engram, batch: int) -> EngramState:
        """The state before the first token."""
        weight, options = layer.value_proj.weight, layer.options
        window = torch.full((batch, layer.ngram_hash.window), layer.ngram_hash.pad, device=weight.device)
        conv = weight.new_zeros(batch, layer.conv_history, options.branches, options.width)
        return cls(window, conv)

    def remember_window(self, compressed: Int64[Tensor, "B T"], ngram_hash: NgramHash) -> None:
        """Keep the last n-1 compressed ids."""
        self.window = torch.cat([self.window, compressed], dim=1)[:, -ngram_hash.window :]

    def extend_conv(self, normed: Float[Tensor, "B T M D"]) -> Float[Tensor, "B all M D"]:
        """Prepend the remembered conv inputs and keep the newest."""
        history = torch.cat([self.conv.to(normed.dtype), normed], dim=1)
        self.conv = history[:, normed.shape[1] :]
        return history
