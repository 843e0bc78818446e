"""What do the memories of a Qwen3.8-Flash-Next checkpoint hold, without loading the model?

The PLE tensors alone are read from the raw safetensors (`...layers.{i}.ple.*`), the table row by row from one tensor
or from its shards, so a 190 GB checkpoint opens on a laptop. Everything that needs no running model can be asked;
gates and writes need hidden states captured elsewhere. Constants are stored in this layout and are compared with
those of the configuration.
Misleads: nothing shows how the rest of the model uses what the memory writes.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engram_interp.memory import CompressedVocabulary, EngramOptions, NgramHash, splitmix64_multipliers
from engram_interp.memory.row_reader import RowReader, TableError
from engram_interp.memory.safetensors_rows import open_safetensors_rows
from engram_interp.models.adapters.assemble import RESIDENT_BYTES, assemble_engram
from engram_interp.models.adapters.hooked import StandaloneMemory
from engram_interp.models.adapters.stored_head import open_stored_head
from engram_interp.models.adapters.tensors import AdapterError, TensorFiles, fingerprint, read_config, read_json
from engram_interp.models.checkpoint import CONFIG, load_tokenizer
from engram_interp.models.protocol import ModelIdentity
from engram_interp.models.site import EngramSite, HashConstants, site_of_engram
from engram_interp.shapes import Tensor

VARIANT = "qwen4_exp"


class Qwen4ExpMemoryConfig(BaseModel):
    """The keys a PLE layer needs; defaults are those of transformers' configuration class."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    hidden_size: int = Field(ge=1)
    vocab_size: int = Field(ge=2)
    num_hidden_layers: int = Field(ge=1)
    rms_norm_eps: float = Field(1e-6, gt=0)
    eos_token_id: int | tuple[int, ...]
    hc_count: int = Field(4, ge=1, le=1024)
    ple_layer_ids: tuple[int, ...] = Field(min_length=1, max_length=4096)
    ple_embed_dim: int | None = Field(None, ge=1)
    ple_conv_kernel_size: int = Field(4, ge=1, le=1024)
    ngram_size: int = Field(3, ge=2, le=64)
    heads_per_ngram: int = Field(8, ge=1, le=1024)
    ngram_vocab_size_base: int = Field(20_000_000, ge=2, lt=2**50)
    make_ngram_vocab_size_divisible_by: int = Field(128, ge=1)
    seed: int = 1234

    @model_validator(mode="after")
    def _consistent(self) -> Qwen4ExpMemoryConfig:
        if not all(1 <= layer <= self.num_hidden_layers for layer in self.ple_layer_ids):
            raise ValueError(
                f"expected ple_layer_ids in [1, {self.num_hidden_layers}], found {list(self.ple_layer_ids)}"
            )
        if self.memory_width % ((self.ngram_size - 1) * self.heads_per_ngram):
            raise ValueError(f"expected ple_embed_dim in whole columns per head, found {self.memory_width}")
        if not 0 <= self.eos < self.vocab_size:
            raise ValueError(f"expected eos_token_id in [0, {self.vocab_size}), found {self.eos}")
        return self

    @property
    def memory_width(self) -> int:
        """Width of e_t."""
        return self.ple_embed_dim or self.hidden_size

    @property
    def eos(self) -> int:
        """The id that ends a text; of several, the first."""
        return self.eos_token_id if isinstance(self.eos_token_id, int) else self.eos_token_id[0]


def open_qwen4_exp_memory(directory: Path, *, resident_bytes: int = RESIDENT_BYTES) -> StandaloneMemory:
    """Open the memories of a checkpoint directory and nothing else of it.

    Raises: AdapterError for anything missing, damaged, misshaped, or constants that the configuration contradicts.
    """
    config = _read_config(directory)
    files = TensorFiles(directory)
    vocabulary = CompressedVocabulary.identity(config.vocab_size)
    sites = [
        _open_site(files, config, vocabulary, block, index, resident_bytes)
        for index, block in enumerate(_blocks(config))
    ]
    identity = ModelIdentity(directory.resolve().name, fingerprint(files.opened), directory.name, "qwen4_exp")
    tokenizer = load_tokenizer(directory)
    head = partial(open_stored_head, files, tokenizer.get_vocab_size(), config.hidden_size)
    return StandaloneMemory(sites, tokenizer, identity, head)


def open_tables(directory: Path) -> dict[int, RowReader]:
    """The tables of a checkpoint directory by block, mapped.

    Raises: AdapterError for anything missing or damaged.
    """
    files = TensorFiles(directory)
    return {block: _open_table(files, _find_prefix(files, block)) for block in _blocks(_read_config(directory))}


def _read_config(directory: Path) -> Qwen4ExpMemoryConfig:
    values = read_json(directory / CONFIG)
    text = values.get("text_config")
    return read_config(Qwen4ExpMemoryConfig, values | text if isinstance(text, dict) else values, directory / CONFIG)


def _blocks(config: Qwen4ExpMemoryConfig) -> list[int]:
    return [layer - 1 for layer in sorted(set(config.ple_layer_ids))]


def regenerate(config: object, index: int) -> HashConstants:
    """Multipliers and primes of memory number `index` from the configuration alone; heads of all memories take
    consecutive primes.
    """
    from sympy import nextprime

    heads, orders = config.heads_per_ngram, config.ngram_size - 1  # type: ignore[attr-defined]
    primes, candidate = [], config.ngram_vocab_size_base - 1  # type: ignore[attr-defined]
    for _ in range((index + 1) * orders * heads):
        candidate = int(nextprime(candidate))
        primes.append(candidate)
    own = primes[index * orders * heads :]
    multipliers = splitmix64_multipliers(config.seed, index, config.vocab_size, orders + 1)  # type: ignore[attr-defined]
    divisor = config.make_ngram_vocab_size_divisible_by  # type: ignore[attr-defined]
    by_order = tuple(tuple(own[i : i + heads]) for i in range(0, len(own), heads))
    return HashConstants.regenerate(multipliers, by_order, -(-sum(own) // divisor) * divisor)


def require_equal(stored: HashConstants, regenerated: HashConstants, where: str) -> None:
    """Refuse a checkpoint whose stored constants are not those of its configuration.

    Raises: AdapterError naming the first that differs.
    """
    for name in ("multipliers", "primes", "offsets", "rows"):
        expected, found = getattr(regenerated, name), getattr(stored, name)
        if expected != found:
            raise AdapterError(
                f"{where}: {name}: expected {expected} by the configuration, found {found} in the checkpoint"
            )


def _open_site(
    files: TensorFiles,
    config: Qwen4ExpMemoryConfig,
    vocabulary: CompressedVocabulary,
    block: int,
    index: int,
    resident_bytes: int,
) -> EngramSite:
    prefix = _find_prefix(files, block)
    table = _open_table(files, prefix)
    stored = _stored(files, f"{prefix}ple_embedding.", config, table.rows)  # first: it bounds how many primes to seek
    regenerated = regenerate(config, index)
    require_equal(stored, regenerated, f"{files.path}: block {block}")
    ngram_hash = NgramHash(
        vocabulary, stored.multipliers or (), stored.primes or (), config.eos, boundary="reset", eos=config.eos
    )
    options = EngramOptions(
        width=config.hidden_size,
        branches=config.hc_count,
        head_width=config.memory_width // len(ngram_hash.sizes),
        conv_kernel=config.ple_conv_kernel_size,
        conv_dilation=config.ngram_size,
        gate_eps=config.rms_norm_eps,
        conv_eps=config.rms_norm_eps,
    )
    engram = assemble_engram(ngram_hash, options, _weights(files, prefix, config), table, resident_bytes=resident_bytes)
    return site_of_engram(
        block, engram, VARIANT, streams=config.hc_count, regenerated=regenerated, stored=stored, rows=table,
        numbered_rows=True,
    )  # fmt: skip


def _weights(files: TensorFiles, prefix: str, config: Qwen4ExpMemoryConfig) -> dict[str, Tensor]:
    m, d, mem, kernel = config.hc_count, config.hidden_size, config.memory_width, config.ple_conv_kernel_size
    return {
        "key_proj.weight": files.floats(f"{prefix}key_proj.weight", (m * d, mem)),
        "value_proj.weight": files.floats(f"{prefix}value_proj.weight", (d, mem)),
        "key_norm": 1 + files.floats(f"{prefix}norm_key.weight", (m * d,)).view(m, d),
        "query_norm": 1 + files.floats(f"{prefix}norm_query.weight", (m * d,)).view(m, d),
        "conv_norm": 1 + files.floats(f"{prefix}norm_conv.weight", (m * d,)).view(m, d),
        "conv": files.floats(f"{prefix}conv1d.weight", (m * d, 1, kernel)).view(m, d, kernel),
    }


def _stored(files: TensorFiles, prefix: str, config: Qwen4ExpMemoryConfig, rows: int) -> HashConstants:
    orders, heads = config.ngram_size - 1, config.heads_per_ngram
    sizes = files.integers(f"{prefix}ngram_heads_vocab_sizes", (orders * heads,)).tolist()
    return HashConstants(
        tuple(files.integers(f"{prefix}layer_multipliers", (config.ngram_size,)).tolist()),
        tuple(tuple(sizes[i : i + heads]) for i in range(0, len(sizes), heads)),
        tuple(files.integers(f"{prefix}ngram_heads_offsets", (orders * heads,)).tolist()),
        rows,
    )


def _find_prefix(files: TensorFiles, block: int) -> str:
    pattern = re.compile(rf"^((?:.*\.)?layers\.{block}\.ple\.)value_proj\.weight$")
    found = [match[1] for name in files.names if (match := pattern.match(name)) and not name.startswith("mtp.")]
    if len(found) != 1:
        raise AdapterError(f"{files.path}: expected one 'layers.{block}.ple.value_proj.weight', found {len(found)}")
    return found[0]


def _open_table(files: TensorFiles, prefix: str) -> RowReader:
    stem = f"{prefix}ple_embedding.ngram_embedding"
    name = f"{stem}.weight" if f"{stem}.weight" in files.names else f"{stem}.shard_*.weight"
    try:
        return open_safetensors_rows(files.path, name)
    except TableError as error:
        raise AdapterError(str(error)) from None
