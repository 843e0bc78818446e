"""What is a house model made of?

One strict description for the Engram model and its mixture-of-experts baseline: the baseline is the same configuration
with `engram` absent and more routed experts, so that total parameters match and the work per token outside the memory
read is equal.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class StrictModel(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class EngramConfig(StrictModel):
    """The memory. `blocks` are 0-based; `rows_per_head` is where the prime search starts, once per order.

    What the paper's section 6.2 takes away: `gate` "open" is a gate of 1, `compressed` false hashes raw ids, `fusion` "mean" reads
    the mean of the streams with one key and writes the same to all of them.
    """

    blocks: tuple[int, ...] = Field(min_length=1)
    rows_per_head: tuple[int, ...] = Field(min_length=1)
    heads: int = Field(8, ge=1)
    head_width: int = Field(ge=1)
    compressed_vocab_size: int = Field(ge=1)
    seed: int = 0
    gate: Literal["signed_root", "signed_root_copysign", "plain", "open"] = "signed_root"
    compressed: bool = True
    fusion: Literal["branches", "mean"] = "branches"
    biases: bool = False
    conv_kernel: int = Field(4, ge=0)

    @property
    def max_order(self) -> int:
        """N, the longest n-gram."""
        return len(self.rows_per_head) + 1


class ModelConfig(StrictModel):
    """A house model. `routed_experts` per block, `active_experts` of them per token, one shared expert besides.

    The first `dense_blocks` have one feed-forward of `dense_width` instead of experts; `tied` shares the embedding with the head.
    """

    name: str
    vocab_size: int = Field(ge=4)
    context: int = Field(ge=2)
    width: int = Field(ge=2)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    streams: int = Field(1, ge=1)
    routed_experts: int = Field(ge=1)
    active_experts: int = Field(ge=1)
    expert_width: int = Field(ge=1)
    shared_width: int = Field(ge=1)
    dense_blocks: int = Field(0, ge=0)
    dense_width: int = Field(0, ge=0)
    tied: bool = True
    rope_theta: float = Field(10_000.0, gt=0)
    norm_eps: float = Field(1e-6, gt=0)
    bos_id: int = 0
    pad_id: int = 2
    engram: EngramConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"expected width / heads to be an even integer, found {self.width} / {self.heads}")
        if self.active_experts > self.routed_experts:
            raise ValueError(
                f"expected active_experts <= routed_experts, found {self.active_experts} > {self.routed_experts}"
            )
        if self.dense_blocks > self.layers or (self.dense_blocks > 0) != (self.dense_width > 0):
            raise ValueError(
                f"expected at most {self.layers} dense_blocks, and a dense_width with them, found {self.dense_blocks} of "
                f"width {self.dense_width}"
            )
        if self.engram and not all(0 <= b < self.layers for b in self.engram.blocks):
            raise ValueError(f"expected engram blocks in [0, {self.layers}), found {list(self.engram.blocks)}")
        if self.engram and len(set(self.engram.blocks)) != len(self.engram.blocks):
            raise ValueError(f"expected distinct engram blocks, found {list(self.engram.blocks)}")
        return self

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads
