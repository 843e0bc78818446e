"""How are the memories of a DeepSeek-V4.1 checkpoint read from its raw safetensors, without the other 300 GB?

Layout (`layers.{i}.engram.`): `embed.weight` FP8 E4M3 [rows, head] with `embed.scale` E8M0 per 32 columns;
`wkv.weight` FP8 [(M+1) D, mem] with `wkv.scale` per 32 x 32, the M keys branch-major, then the value; `q_weight`,
`k_weight` [M, D]. Multipliers, primes and the token map are not stored: they are rebuilt from `config.json` and
`tokenizer.json` and checked against `engram_num_embeddings` and `engram_compressed_vocab_size`. No convolution, no
biases, copysign gate, eps 1e-20.
Misleads: the released kernels round rows and projections to bfloat16; here everything after dequantisation is
float32.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from engram_interp.memory import CompressedVocabulary, EngramOptions, NgramHash, assign_primes, pcg64_multipliers
from engram_interp.memory.row_reader import RowReader, TableError
from engram_interp.memory.safetensors_rows import SafetensorsRows
from engram_interp.models.adapters.assemble import RESIDENT_BYTES, assemble_engram
from engram_interp.models.adapters.hooked import StandaloneMemory
from engram_interp.models.adapters.stored_head import open_stored_head
from engram_interp.models.adapters.tensors import AdapterError, TensorFiles, fingerprint, read_config, read_json
from engram_interp.models.checkpoint import CONFIG, load_tokenizer
from engram_interp.models.protocol import ModelIdentity
from engram_interp.models.site import EngramSite, HashConstants, site_of_engram

MODEL_TYPES = ("deepseek_v41", "deepseek_v41_text")
SCALE_BLOCK = 32
_PREFIXES = ("", "model.", "model.language_model.", "language_model.model.", "language_model.")


class DeepseekV41Config(BaseModel):
    """The keys an Engram layer needs, by the Hugging Face name or that of the release's own inference code."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    width: int = Field(validation_alias=AliasChoices("hidden_size", "dim"), ge=1, le=2**20)
    streams: int = Field(validation_alias="hc_mult", ge=1, le=1024)
    eps: float = Field(1e-20, validation_alias=AliasChoices("rms_norm_eps", "norm_eps"), gt=0)
    layers: int = Field(validation_alias=AliasChoices("num_hidden_layers", "n_layers"), ge=1)
    blocks: tuple[int, ...] = Field(validation_alias="engram_layer_ids", min_length=1, max_length=1024)
    rows: tuple[int, ...] = Field(validation_alias="engram_num_embeddings")
    max_order: int = Field(validation_alias="engram_max_ngram_size", ge=2, le=64)
    rows_per_head: int = Field(validation_alias="engram_vocab_size", ge=2, lt=2**50)
    heads: int = Field(validation_alias="engram_n_heads", ge=1, le=1024)
    head_width: int = Field(validation_alias="engram_head_dim", ge=1, le=2**20)
    compressed_vocab_size: int = Field(validation_alias="engram_compressed_vocab_size", ge=1)
    pad_token_id: int = Field(validation_alias=AliasChoices("engram_pad_token_id", "engram_pad_id"), ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> DeepseekV41Config:
        if len(self.blocks) != len(self.rows):
            raise ValueError(
                f"expected one engram_num_embeddings per engram_layer_ids, found {len(self.rows)}, {len(self.blocks)}"
            )
        if self.head_width > SCALE_BLOCK and self.head_width % SCALE_BLOCK:
            raise ValueError(f"expected engram_head_dim in whole blocks of {SCALE_BLOCK}, found {self.head_width}")
        fewest = (self.max_order - 1) * self.heads * self.rows_per_head
        if min(self.rows) < fewest:  # said before a prime is sought: a claim of many heads would take for ever
            raise ValueError(f"expected at least {fewest} engram_num_embeddings by the heads, found {min(self.rows)}")
        if len(set(self.blocks)) != len(self.blocks) or not all(0 <= b < self.layers for b in self.blocks):
            raise ValueError(f"expected distinct engram_layer_ids in [0, {self.layers}), found {list(self.blocks)}")
        return self

    @property
    def memory_width(self) -> int:
        """Width of e_t."""
        return (self.max_order - 1) * self.heads * self.head_width


def open_deepseek_v41(directory: Path, *, resident_bytes: int = RESIDENT_BYTES) -> StandaloneMemory:
    """Open the memories of a checkpoint directory.

    Args: resident_bytes: tables larger than this in float32 stay in their file and are read row by row.
    Raises: AdapterError for a missing shard, a truncated or damaged file, a wrong dtype or shape, an unusable index, or
        a configuration that contradicts the tokenizer or the tensors.
    """
    config = _load_config(directory)
    tokenizer = load_tokenizer(directory)
    vocabulary = CompressedVocabulary.from_tokenizer(tokenizer)
    if vocabulary.size != config.compressed_vocab_size:
        raise AdapterError(
            f"{directory}: config says engram_compressed_vocab_size {config.compressed_vocab_size}, the tokenizer "
            f"compresses to {vocabulary.size}; every address depends on it"
        )
    if config.pad_token_id >= vocabulary.raw_size:
        raise AdapterError(f"{directory}: expected a pad id below {vocabulary.raw_size}, found {config.pad_token_id}")
    files = TensorFiles(directory)
    constants = _constants(config, directory)
    sites = [
        _open_site(files, config, vocabulary, block, constants[index], resident_bytes)
        for index, block in enumerate(config.blocks)
    ]
    identity = ModelIdentity(directory.resolve().name, fingerprint(files.opened), directory.name, "deepseek_v41")
    head = partial(open_stored_head, files, tokenizer.get_vocab_size(), config.width)
    return StandaloneMemory(sites, tokenizer, identity, head)


def _load_config(directory: Path) -> DeepseekV41Config:
    values = read_json(directory / CONFIG)
    text = values.get("text_config")
    if isinstance(text, dict):
        values = values | text
    return read_config(DeepseekV41Config, values, directory / CONFIG)


def _constants(config: DeepseekV41Config, directory: Path) -> list[HashConstants]:
    orders = [config.rows_per_head] * (config.max_order - 1)
    constants = []
    for block, rows, primes in zip(
        config.blocks, config.rows, assign_primes(orders, config.heads, len(config.blocks)), strict=True
    ):
        multipliers = pcg64_multipliers(0, block, config.compressed_vocab_size, config.max_order)
        constants.append(HashConstants.regenerate(multipliers, primes))
        if constants[-1].rows != rows:
            raise AdapterError(
                f"{directory / CONFIG}: block {block}: engram_vocab_size {config.rows_per_head} with "
                f"{config.heads} heads of {config.max_order - 1} orders needs {constants[-1].rows} rows, "
                f"engram_num_embeddings says {rows}"
            )
    return constants


def _open_site(
    files: TensorFiles,
    config: DeepseekV41Config,
    vocabulary: CompressedVocabulary,
    block: int,
    constants: HashConstants,
    resident_bytes: int,
) -> EngramSite:
    prefix = _find_prefix(files, block)
    table = _open_table(files, prefix, constants.rows or 0, config.head_width)
    m, d = config.streams, config.width
    wkv = files.dequantised(
        f"{prefix}wkv.weight", f"{prefix}wkv.scale", ((m + 1) * d, config.memory_width), SCALE_BLOCK
    )
    weights = {
        "key_proj.weight": wkv[: m * d],
        "value_proj.weight": wkv[m * d :],
        "query_norm": files.floats(f"{prefix}q_weight", (m, d)),
        "key_norm": files.floats(f"{prefix}k_weight", (m, d)),
    }
    pad = int(vocabulary.token_map[config.pad_token_id])
    ngram_hash = NgramHash(vocabulary, constants.multipliers or (), constants.primes or (), pad)
    options = EngramOptions(
        width=d,
        branches=m,
        head_width=config.head_width,
        gate="signed_root_copysign",
        conv_kernel=0,
        gate_eps=config.eps,
    )
    engram = assemble_engram(ngram_hash, options, weights, table, resident_bytes=resident_bytes)
    return site_of_engram(
        block, engram, "deepseek_v41", streams=m, regenerated=constants, rows=table, numbered_rows=True
    )


def _find_prefix(files: TensorFiles, block: int) -> str:
    candidates = [f"{prefix}layers.{block}.engram." for prefix in _PREFIXES]
    found = [prefix for prefix in candidates if f"{prefix}embed.weight" in files.names]
    if len(found) != 1:
        raise AdapterError(
            f"{files.path}: expected one tensor 'layers.{block}.engram.embed.weight' (config lists block {block}), "
            f"found {len(found)}"
        )
    return found[0]


def _open_table(files: TensorFiles, prefix: str, rows: int, head_width: int) -> RowReader:
    weight = files.entry(f"{prefix}embed.weight", ("F8_E4M3",), (rows, head_width))
    scale = files.entry(f"{prefix}embed.scale", ("F8_E8M0",), (rows, -(-head_width // SCALE_BLOCK)))
    try:
        return SafetensorsRows(weight, scale)
    except TableError as error:
        raise AdapterError(str(error)) from None
