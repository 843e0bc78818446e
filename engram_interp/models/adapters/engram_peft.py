"""How does a base model behave with an adapter that engram-peft trained? Read without importing that program.

An adapter is `config.json` and `engram_adapters.safetensors` ({block}.multi_head_embedding / .gating / .short_conv).
Hash constants are rebuilt from the configuration and the base model's tokenizer. Its hash is not the demo's, and is
named for what it is, `engram_peft_1_2`: rows per order are divided by the heads, multipliers go to the oldest token
first, and the window of an order below the largest starts at the padded origin, so a bigram is (x[t-2], x[t-1]) and
does not see the current token. The `hc_mult` branches are copies of one residual stream, and their outputs are summed
into it before the block.
Misleads: gates of branches add up, so the effective gate of a token lies in (0, M), not (0, 1).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from engram_interp.memory import CompressedVocabulary, EngramOptions, NgramHash, assign_primes, pcg64_multipliers
from engram_interp.memory.row_reader import TableError
from engram_interp.memory.safetensors_rows import SafetensorsRows
from engram_interp.models.adapters.assemble import RESIDENT_BYTES, assemble_engram
from engram_interp.models.adapters.hosted import (
    HostedModel,
    HostLayout,
    load_host,
    load_host_tokenizer,
    weight_files,
)
from engram_interp.models.adapters.tensors import FLOATS, AdapterError, TensorFiles, fingerprint, read_config, read_json
from engram_interp.models.checkpoint import CONFIG, load_tokenizer
from engram_interp.models.protocol import ModelIdentity
from engram_interp.models.site import EngramSite, HashConstants, site_of_engram
from engram_interp.shapes import Float, Tensor

WEIGHTS = "engram_adapters.safetensors"
VARIANT = "engram_peft_1_2"
_OFFSETS = "{}.multi_head_embedding.offsets"


class EngramPeftConfig(BaseModel):
    """The keys of an adapter that decide what it computes."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    target_layers: tuple[int, ...] = Field(min_length=1, max_length=4096)
    ngram_sizes: tuple[int, ...] = Field(min_length=1, max_length=63)
    n_head_per_ngram: int = Field(ge=1, le=1024)
    engram_vocab_size_per_ngram: tuple[int, ...]
    embedding_dim: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    hc_mult: int = Field(ge=1, le=1024)
    conv_kernel_size: int = Field(ge=1, le=1024)
    conv_dilation: int | None = Field(None, ge=1)
    compressed_vocab_size: int = Field(ge=1)
    enable_tokenizer_compression: bool = True
    pad_id: int = Field(ge=0)
    seed: int = Field(0, ge=0)
    layer_container_path: str | None = None
    engine: Literal["deepseek"] = "deepseek"
    # What an adapter may also say and cannot be read from its folder alone: a table kept elsewhere, a LoRA beneath it.
    table_source: Literal["memory"] = "memory"
    prime_sizes: None = None
    table_scale: None = None
    wrap_peft: Literal[False] = False

    @model_validator(mode="after")
    def _consistent(self) -> EngramPeftConfig:
        expected = tuple(range(2, len(self.ngram_sizes) + 2))
        if self.ngram_sizes != expected:
            raise ValueError(f"expected ngram_sizes {list(expected)}, found {list(self.ngram_sizes)}")
        if len(self.engram_vocab_size_per_ngram) != len(self.ngram_sizes):
            raise ValueError(
                f"expected {len(self.ngram_sizes)} engram_vocab_size_per_ngram, "
                f"found {len(self.engram_vocab_size_per_ngram)}"
            )
        if min(self.rows_per_head) < 2 or max(self.rows_per_head) >= 2**50:
            raise ValueError(f"expected at least 2 rows per head, found {list(self.rows_per_head)}")
        if self.embedding_dim % (len(self.ngram_sizes) * self.n_head_per_ngram):
            raise ValueError(f"expected embedding_dim in whole columns per head, found {self.embedding_dim}")
        if len(set(self.target_layers)) != len(self.target_layers):
            raise ValueError(f"expected distinct target_layers, found {list(self.target_layers)}")
        return self

    @property
    def rows_per_head(self) -> tuple[int, ...]:
        """Where each order's prime search starts: this program divides the size of an order by its heads."""
        return tuple(size // self.n_head_per_ngram for size in self.engram_vocab_size_per_ngram)

    @property
    def max_order(self) -> int:
        """N."""
        return self.ngram_sizes[-1]

    @property
    def head_width(self) -> int:
        """Columns of a row."""
        return self.embedding_dim // (len(self.ngram_sizes) * self.n_head_per_ngram)


def open_engram_peft(
    adapter: Path, base: Path | nn.Module, *, tokenizer: Path | None = None, resident_bytes: int = RESIDENT_BYTES
) -> EngramPeftModel:
    """Put an adapter on a Hugging Face base model.

    Args: base: a model directory, a GGUF file, or a causal language model already loaded (then `tokenizer` is a
        directory with its tokenizer.json). resident_bytes: larger tables stay in their file.
    Raises: AdapterError for anything missing, damaged, misshaped, or at odds with the base model or its tokenizer.
    """
    config = read_config(EngramPeftConfig, read_json(adapter / CONFIG), adapter / CONFIG)
    if tokenizer is None and not isinstance(base, Path):
        raise AdapterError(
            "expected the directory of the base model's tokenizer beside a loaded base model, found None"
        )
    loaded_tokenizer = load_tokenizer(tokenizer) if tokenizer else load_host_tokenizer(base)  # type: ignore[arg-type]
    host = load_host(base) if isinstance(base, Path) else base
    layout = HostLayout.find(host, config.layer_container_path)
    if layout.width != config.hidden_size:
        raise AdapterError(f"{adapter}: adapter for width {config.hidden_size}, the base model has {layout.width}")
    if not all(0 <= block < len(layout.layers) for block in config.target_layers):
        raise AdapterError(
            f"{adapter}: expected target_layers in [0, {len(layout.layers)}), found {list(config.target_layers)}"
        )
    files = TensorFiles(adapter / WEIGHTS)
    sites = _open_sites(files, config, _vocabulary(config, loaded_tokenizer, adapter), resident_bytes)
    hashed = [*weight_files(base), *files.files] if isinstance(base, Path) else files.files
    identity = ModelIdentity(adapter.resolve().name, fingerprint(hashed), adapter.name, "engram_peft")
    model = EngramPeftModel(host, layout, sites, loaded_tokenizer, identity)
    model.require_own_exit()
    return model


def _vocabulary(config: EngramPeftConfig, tokenizer, adapter: Path) -> CompressedVocabulary:  # noqa: ANN001
    if not config.enable_tokenizer_compression:
        return CompressedVocabulary.identity(config.compressed_vocab_size)
    vocabulary = CompressedVocabulary.from_tokenizer(tokenizer)
    if vocabulary.size != config.compressed_vocab_size:
        raise AdapterError(
            f"{adapter}: config says compressed_vocab_size {config.compressed_vocab_size}, the base model's tokenizer "
            f"compresses to {vocabulary.size}; every address depends on it"
        )
    return vocabulary


def _open_sites(
    files: TensorFiles, config: EngramPeftConfig, vocabulary: CompressedVocabulary, resident_bytes: int
) -> list[EngramSite]:
    if config.pad_id >= vocabulary.raw_size:
        raise AdapterError(f"{files.path}: expected a pad id below {vocabulary.raw_size}, found {config.pad_id}")
    blocks = sorted(config.target_layers)  # primes are dealt out in this order
    slots = len(config.ngram_sizes) * config.n_head_per_ngram
    for block in blocks:  # before a prime is sought: a claim of many heads would take for ever
        files.entry(_OFFSETS.format(block), ("I64",), (slots,))
    primes = assign_primes(config.rows_per_head, config.n_head_per_ngram, len(blocks))
    sites, read = [], set()
    for block, block_primes in zip(blocks, primes, strict=True):
        multipliers = pcg64_multipliers(config.seed, block, config.compressed_vocab_size, config.max_order)
        constants = HashConstants.regenerate(multipliers, block_primes)
        sites.append(_open_site(files, config, vocabulary, block, constants, resident_bytes, read))
    if extra := sorted(set(files.names) - read):
        raise AdapterError(f"{files.path}: {len(extra)} unexpected tensors, the first is {extra[0]!r}")
    return sites


def _open_site(
    files: TensorFiles,
    config: EngramPeftConfig,
    vocabulary: CompressedVocabulary,
    block: int,
    constants: HashConstants,
    resident_bytes: int,
    read: set[str],
) -> EngramSite:
    m, d, mem = config.hc_mult, config.hidden_size, config.embedding_dim

    def weight(name: str, shape: tuple[int, ...]) -> Tensor:
        read.add(f"{block}.{name}")
        return files.floats(f"{block}.{name}", shape)

    def branches(name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.stack([weight(name.format(branch), shape) for branch in range(m)])

    table_name = f"{block}.multi_head_embedding.embedding.weight"
    offsets_name = _OFFSETS.format(block)
    read |= {table_name, offsets_name}
    entry = files.entry(table_name, FLOATS, (constants.rows or 0, config.head_width))
    stored = HashConstants(offsets=tuple(files.integers(offsets_name, (len(constants.offsets or ()),)).tolist()))
    if stored.offsets != constants.offsets:
        raise AdapterError(
            f"{files.path}: {offsets_name}: expected {list(constants.offsets or ())[:4]}... by the configuration, "
            f"found {list(stored.offsets or ())[:4]}..."
        )
    weights = {
        "value_proj.weight": weight("gating.w_v.weight", (d, mem)),
        "key_proj.weight": branches("gating.w_k.{}.weight", (d, mem)).flatten(0, 1),
        "key_norm": branches("gating.norm_k.{}.weight", (d,)),
        "query_norm": branches("gating.norm_h.{}.weight", (d,)),
        "conv_norm": branches("short_conv.norms.{}.weight", (d,)),
        "conv": weight("short_conv.conv.weight", (m * d, 1, config.conv_kernel_size)).view(m, d, -1),
    }
    _refuse_conv_bias(files, block, m * d, read)
    mapped_pad = int(vocabulary.token_map[config.pad_id])
    ngram_hash = NgramHash(
        vocabulary, constants.multipliers or (), constants.primes or (), mapped_pad, window_rule=VARIANT
    )
    options = EngramOptions(
        width=d,
        branches=m,
        head_width=config.head_width,
        conv_kernel=config.conv_kernel_size,
        conv_dilation=config.conv_dilation or config.max_order,
    )
    try:
        table = SafetensorsRows(entry)
    except TableError as error:
        raise AdapterError(str(error)) from None
    engram = assemble_engram(ngram_hash, options, weights, table, resident_bytes=resident_bytes)
    return site_of_engram(block, engram, VARIANT, streams=1, regenerated=constants, stored=stored, rows=table)


def _refuse_conv_bias(files: TensorFiles, block: int, channels: int, read: set[str]) -> None:
    """Some versions of the program gave the convolution a bias; only zeros can be read."""
    name = f"{block}.short_conv.conv.bias"
    if name in files.names:
        read.add(name)
        if bool(files.floats(name, (channels,)).any()):
            raise AdapterError(f"{files.path}: {name}: expected no convolution bias or zeros, found other values")


class EngramPeftModel(HostedModel):
    """A base model with an engram-peft adapter."""

    def before_block(self, block: int, hidden: Float[Tensor, "B T 1 D"]) -> Float[Tensor, "B T 1 D"]:
        """Add what the memory of a block writes: the sum over branches that all read the one stream."""
        engram, points = self.engram(block), self.blocks[block]
        copies = hidden.expand(-1, -1, engram.options.branches, -1)
        write = engram(copies, self.current_tokens()).sum(dim=2, keepdim=True)
        return hidden + points.hook_engram_out(write)
