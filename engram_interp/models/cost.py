"""What does a configuration cost: parameters, and work per token?

From the configuration alone, so that two models can be compared before either is built. Work counts matrix products (2
FLOPs per multiply-add) of one forward, per token, at a full context whose masked half attention computes too; norms,
gates, convolution, stream mixing and other elementwise work are left out. Misleads: a table row costs a cache miss, not
FLOPs, so `memory` is the cheap part of what the memory costs; the router grows with the number of experts, which is why
it is kept apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from engram_interp.memory import assign_primes
from engram_interp.models.config import EngramConfig, ModelConfig


@dataclass(frozen=True)
class ActiveFlops:
    """FLOPs of one token's forward by part. `memory` is key and value projections; `router` chooses experts."""

    attention: int
    experts: int
    unembedding: int
    router: int
    memory: int

    @property
    def backbone(self) -> int:
        """The work outside the memory read and the choice of experts: what must be equal in an iso-FLOP pair."""
        return self.attention + self.experts + self.unembedding

    @property
    def total(self) -> int:
        """All of it."""
        return self.backbone + self.router + self.memory


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the model a configuration describes, table rows included; the unembedding is the embedding."""
    d = config.width
    connections = 2 * 3 * config.streams if config.streams > 1 else 0
    attention = 4 * d * d
    experts = config.routed_experts * d + 3 * d * (config.routed_experts * config.expert_width + config.shared_width)
    blocks = config.layers * (2 * d + attention + connections)
    blocks += (config.layers - config.dense_blocks) * experts + config.dense_blocks * 3 * d * config.dense_width
    embeddings = (1 if config.tied else 2) * config.vocab_size * d
    return embeddings + blocks + d + memory_parameters(config)


def active_parameters(config: ModelConfig) -> int:
    """Parameters that one token's forward multiplies with: neither unread rows and experts nor the embedding it looks up."""
    d = config.width
    memory = memory_parameters(config)
    if config.engram is not None:
        rows = sum(prime for layer in _primes(config.engram) for order in layer for prime in order)
        memory -= rows * config.engram.head_width
    idle = (config.routed_experts - config.active_experts) * 3 * d * config.expert_width
    looked_up = 0 if config.tied else config.vocab_size * d
    total = parameter_count(config) - memory_parameters(config) + memory
    return total - (config.layers - config.dense_blocks) * idle - looked_up


def memory_parameters(config: ModelConfig) -> int:
    """Parameters of all memories: rows, projections, norms and taps; 0 without a memory."""
    engram = config.engram
    if engram is None:
        return 0
    rows = sum(prime for layer in _primes(engram) for order in layer for prime in order)
    branch_width = _branches(config) * config.width
    norms_and_taps = 2 * branch_width + ((engram.conv_kernel + 1) * branch_width if engram.conv_kernel else 0)
    biases = config.width + branch_width if engram.biases else 0
    per_layer = _memory_width(config) * (config.width + branch_width) + biases + norms_and_taps
    return rows * engram.head_width + len(engram.blocks) * per_layer


def active_flops(config: ModelConfig) -> ActiveFlops:
    """Work per token of a full context."""
    d, layers = config.width, config.layers
    chosen = config.active_experts * config.expert_width + config.shared_width
    mixed = config.layers - config.dense_blocks
    memories = len(config.engram.blocks) if config.engram else 0
    return ActiveFlops(
        attention=layers * (8 * d * d + 4 * config.context * d),
        experts=mixed * 6 * d * chosen + config.dense_blocks * 6 * d * config.dense_width,
        unembedding=2 * d * config.vocab_size,
        router=mixed * 2 * d * config.routed_experts,
        memory=memories * 2 * _memory_width(config) * d * (1 + _branches(config)),
    )


def _primes(engram: EngramConfig) -> tuple[tuple[tuple[int, ...], ...], ...]:
    return assign_primes(engram.rows_per_head, engram.heads, len(engram.blocks))


def _branches(config: ModelConfig) -> int:
    return 1 if config.engram and config.engram.fusion == "mean" else config.streams


def _memory_width(config: ModelConfig) -> int:
    engram = config.engram
    return len(engram.rows_per_head) * engram.heads * engram.head_width if engram else 0
