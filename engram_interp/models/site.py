"""What is this memory, exactly? One record per memory site, the same for every model that ships Engram.

Published Engram layers differ in hash, boundary rule, norms, gate, convolution and streams (arXiv 2601.07372 and the
code of the demo, Qwen3.8-Flash-Next, DeepSeek-V4.1-Flash and engram-peft). The record holds every choice as plain
values, and the hash constants three times: as used, as regenerated from the configuration, and as stored in the
checkpoint (where they are).
Cost: none, tensors are shared. Misleads: gains are the factors actually multiplied (Qwen stores w and multiplies by 1
+ w).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

from engram_interp.memory import CompressedVocabulary, Engram, assign_primes, pcg64_multipliers
from engram_interp.memory.engram import GateForm
from engram_interp.memory.hashing import BoundaryRule, WindowRule
from engram_interp.memory.in_memory_rows import InMemoryRows
from engram_interp.memory.row_reader import RowReader
from engram_interp.models.house import HouseModel
from engram_interp.shapes import Float, Tensor


@dataclass(frozen=True)
class HashConstants:
    """The integers that fix every address; None where a source does not hold one. `rows` includes padding."""

    multipliers: tuple[int, ...] | None = None
    primes: tuple[tuple[int, ...], ...] | None = None
    offsets: tuple[int, ...] | None = None
    rows: int | None = None

    @classmethod
    def regenerate(
        cls, multipliers: tuple[int, ...], primes: tuple[tuple[int, ...], ...], rows: int | None = None
    ) -> HashConstants:
        """From multipliers and primes; offsets are the running sum of the primes."""
        sizes = [prime for row in primes for prime in row]
        return cls(multipliers, primes, (0, *accumulate(sizes))[:-1], sum(sizes) if rows is None else rows)


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear map of the memory vector."""

    weight: Float[Tensor, "out mem"]
    bias: Float[Tensor, " out"] | None


@dataclass(frozen=True, eq=False)
class ShortConvolution:
    """SiLU(conv(RMSNorm(u))): `taps[..., -1]` is for the current token, the one before it for `t - dilation`."""

    taps: Float[Tensor, "M D kernel"]
    gain: Float[Tensor, "M D"]
    dilation: int
    eps: float


@dataclass(frozen=True, eq=False)
class EngramSite:
    """One memory site.

    `block` is 0-based; `variant` names whose hash it is; `primes[n][k]` are the rows of head k of order `orders[n]`;
    `pad` and `eos` are compressed ids; `branches` gates per token write into `streams` residual streams (fewer streams
    than branches: the branches are summed); `numbered_rows` says that the model's own records number rows of the flat
    table, not of a head.
    """

    block: int
    variant: str
    orders: tuple[int, ...]
    heads: int
    primes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    multipliers: tuple[int, ...]
    vocabulary: CompressedVocabulary = field(repr=False)
    pad: int
    eos: int | None
    boundary: BoundaryRule
    window_rule: WindowRule
    rows: RowReader
    value: Projection
    keys: tuple[Projection, ...]
    key_gain: Float[Tensor, "M D"]
    query_gain: Float[Tensor, "M D"]
    gate_eps: float | None
    gate: GateForm
    conv: ShortConvolution | None
    branches: int
    streams: int
    width: int
    head_width: int
    regenerated: HashConstants
    stored: HashConstants
    numbered_rows: bool
    engram: Engram = field(repr=False)

    @property
    def slots(self) -> int:
        """S, slots per token."""
        return len(self.offsets)

    @property
    def used(self) -> HashConstants:
        """The constants this site addresses with."""
        return HashConstants(self.multipliers, self.primes, self.offsets, self.rows.rows)

    def lags(self, order: int) -> tuple[int, ...]:
        """How many tokens back lie the tokens that address a head of this order."""
        return self.engram.ngram_hash.lags(order)

    def as_dict(self) -> dict[str, object]:
        """The plain values, for JSON."""
        plain = ("block", "variant", "orders", "heads", "primes", "offsets", "multipliers", "pad", "eos", "boundary")
        plain += ("window_rule", "gate_eps", "gate", "branches", "streams", "width", "head_width")
        conv = self.conv and {"kernel": self.conv.taps.shape[-1], "dilation": self.conv.dilation, "eps": self.conv.eps}
        values = {name: getattr(self, name) for name in plain}
        biases = self.value.bias is not None
        return values | {"rows": self.rows.rows, "biases": biases, "conv": conv, "vocabulary": self.vocabulary.size}


def site_of_engram(
    block: int,
    engram: Engram,
    variant: str,
    *,
    streams: int,
    regenerated: HashConstants,
    stored: HashConstants | None = None,
    rows: RowReader | None = None,
    numbered_rows: bool = False,
) -> EngramSite:
    """The record of an Engram module.

    Args: rows: the table's reader; None reads the module's own weight.
    """
    ngram_hash, options = engram.ngram_hash, engram.options
    key_biases = (
        engram.key_proj.bias.unflatten(0, (options.branches, -1)) if options.biases else [None] * options.branches
    )
    key_weights = engram.key_proj.weight.unflatten(0, (options.branches, -1))
    conv = None
    if options.conv_kernel:
        conv = ShortConvolution(engram.conv, engram.conv_norm, engram.dilation, options.conv_eps)
    return EngramSite(
        block=block,
        variant=variant,
        orders=ngram_hash.orders,
        heads=ngram_hash.heads,
        primes=ngram_hash.primes,
        offsets=ngram_hash.offsets,
        multipliers=ngram_hash.multipliers,
        vocabulary=ngram_hash.vocabulary,
        pad=ngram_hash.pad,
        eos=ngram_hash.eos,
        boundary=ngram_hash.boundary,
        window_rule=ngram_hash.window_rule,
        rows=rows or InMemoryRows(engram.table.weight, f"blocks.{block}.engram.table.weight"),
        value=Projection(engram.value_proj.weight, engram.value_proj.bias),
        keys=tuple(Projection(weight, bias) for weight, bias in zip(key_weights, key_biases, strict=True)),
        key_gain=engram.key_norm,
        query_gain=engram.query_norm,
        gate_eps=options.gate_eps,
        gate=options.gate,
        conv=conv,
        branches=options.branches,
        streams=streams,
        width=options.width,
        head_width=options.head_width,
        regenerated=regenerated,
        stored=stored or HashConstants(),
        numbered_rows=numbered_rows,
        engram=engram,
    )


def sites_of(model: object) -> tuple[EngramSite, ...]:
    """The memory sites of a house model or an adapter, by block; empty for a model without a memory.

    Raises: ValueError for an object that is neither.
    """
    if isinstance(model, HouseModel):
        return tuple(_house_sites(model))
    sites = getattr(model, "sites", None)
    if not isinstance(sites, tuple):
        raise ValueError(f"expected a house model or an adapter with memory sites, found {type(model).__name__}")
    return sites


def _house_sites(model: HouseModel) -> Iterable[EngramSite]:
    config = model.cfg.engram
    if config is None:
        return
    primes = dict(
        zip(config.blocks, assign_primes(config.rows_per_head, config.heads, len(config.blocks)), strict=True)
    )
    for block in model.engram_layers:
        engram = model.engram(block)
        multipliers = pcg64_multipliers(config.seed, block, config.compressed_vocab_size, config.max_order)
        constants = HashConstants.regenerate(multipliers, primes[block])
        yield site_of_engram(block, engram, "demo", streams=model.cfg.streams, regenerated=constants)
