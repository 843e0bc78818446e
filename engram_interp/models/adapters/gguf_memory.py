"""What do the memories of a GGUF file hold? Most people who run these models at home have this form.

Qwen3.8-Flash-Next (`qwen4exp`, llama.cpp): one memory, `per_layer_token_embd.weight` and `blk.N.ple_*`, constants under
`qwen4exp.ple.*`. DeepSeek-V4.1-Flash (`deepseek41`): `blk.N.engram_{embd,wkv,q,k}`, constants and the token map under
`deepseek41.engram.*`, in the spelling of llama.cpp or of ds4 (which keeps the table as the original FP8 bytes). Orders,
heads, streams and width follow from the arrays and tensors, so both spellings are read alike. The file's constants are
those used; `check` compares them with regenerated ones.
Misleads: quantised weights are what the running model sees, not what was trained. The norms of `ple_*` hold 1 + w. The
file's own tokenizer is not rebuilt (its splitting rule is only named there): put the model's tokenizer.json beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from engram_interp.memory import (
    CompressedVocabulary,
    EngramOptions,
    NgramHash,
    assign_primes,
    pcg64_multipliers,
    splitmix64_multipliers,
)
from engram_interp.memory.gguf_header import MetadataValue, read_gguf_header
from engram_interp.memory.gguf_rows import GgufFile
from engram_interp.memory.row_reader import RowReader, TableError
from engram_interp.models.adapters.assemble import RESIDENT_BYTES, assemble_engram
from engram_interp.models.adapters.hooked import StandaloneMemory
from engram_interp.models.adapters.stored_head import StoredHead
from engram_interp.models.adapters.tensors import AdapterError, fingerprint
from engram_interp.models.checkpoint import TOKENIZER, load_tokenizer
from engram_interp.models.protocol import ModelIdentity
from engram_interp.models.site import EngramSite, HashConstants, site_of_engram
from engram_interp.shapes import Tensor

ARCHITECTURES = ("qwen4exp", "deepseek41")
_EPS = "attention.layer_norm_rms_epsilon"
_QWEN_SEED = 1234
_V41_EPS = 1e-20
_HEADS = ("output.weight", "token_embd.weight")  # the second where they are one tensor


@dataclass(frozen=True, eq=False)
class _Source:
    file: GgufFile
    vocabulary: CompressedVocabulary
    resident_bytes: int


def gguf_architecture(path: Path) -> str:
    """`general.architecture` of a GGUF file; empty where it says none.

    Raises: AdapterError for a damaged header.
    """
    try:
        return str(read_gguf_header(path).metadata.get("general.architecture", ""))
    except TableError as error:
        raise AdapterError(str(error)) from None


def open_gguf_memory(path: Path, *, resident_bytes: int = RESIDENT_BYTES) -> StandaloneMemory:
    """Open the memories of a GGUF file (of split files, any part) and nothing else of it.

    Raises: AdapterError for anything missing, damaged or misshaped, constants that contradict one another, or a
        tokenizer.json beside the file that is another model's.
    """
    try:
        file = GgufFile(path)
        tokenizer = load_tokenizer(path.parent) if (path.parent / TOKENIZER).is_file() else None
        qwen = file.architecture == "qwen4exp"
        vocabulary = (_qwen_vocabulary if qwen else _v41_vocabulary)(file, tokenizer)
        source = _Source(file, vocabulary, resident_bytes)
        sites = [_qwen_site(source)] if qwen else _v41_sites(source)
    except TableError as error:
        raise AdapterError(str(error)) from None
    except ValueError as error:  # a hash that its constants cannot describe
        raise error if isinstance(error, AdapterError) else AdapterError(f"{path}: {error}") from None
    identity = ModelIdentity(path.stem, fingerprint(file.parts), path.name, f"gguf {file.architecture}")
    return StandaloneMemory(sites, tokenizer, identity, head=partial(_open_head, file, vocabulary, sites[0].width))


def _open_head(file: GgufFile, vocabulary: CompressedVocabulary, width: int) -> StoredHead:
    name = next((name for name in _HEADS if name in file.tensors), _HEADS[0])
    return StoredHead(file.rows(name), vocabulary.raw_size, width)


# -- Qwen ------------------------------------------------------------------------------------------------------------


def _qwen_vocabulary(file: GgufFile, tokenizer: Tokenizer | None) -> CompressedVocabulary:
    size = file.info("token_embd.weight").shape[0]
    if tokenizer is not None and tokenizer.get_vocab_size() > size:
        raise AdapterError(f"{file.path}: {size} tokens, {TOKENIZER} beside it has {tokenizer.get_vocab_size()}")
    return CompressedVocabulary.identity(size)


def _qwen_site(source: _Source) -> EngramSite:
    file = source.file
    keys = _Keys(file, "qwen4exp.")
    blocks = keys.integers("ple.layers")
    if len(blocks) != 1:
        raise AdapterError(f"{file.path}: expected one memory in qwen4exp.ple.layers, found {list(blocks)}")
    width, streams, kernel = (
        keys.integer(k) for k in ("embedding_length", "hyper_connection.count", "ple.conv_kernel")
    )
    eos, heads, eps = keys.integer("ple.eos_token_id"), keys.integer("ple.heads_per_ngram"), keys.number(_EPS)
    multipliers, sizes = keys.integers("ple.layer_multipliers"), keys.integers("ple.head_vocab_sizes")
    primes = _by_order(file, sizes, len(multipliers) - 1, heads)
    table = file.rows("per_layer_token_embd.weight")
    if not 0 <= eos < source.vocabulary.size:
        raise AdapterError(f"{file.path}: expected ple.eos_token_id below {source.vocabulary.size}, found {eos}")
    prefix, grid = f"blk.{blocks[0]}.ple_", (streams, width)
    weights = {
        "key_proj.weight": _tensor(file, f"{prefix}key.weight"),
        "value_proj.weight": _tensor(file, f"{prefix}value.weight"),
        **{f"{n}_norm": _grid(file, f"{prefix}norm_{n}.weight", grid) for n in ("key", "query", "conv")},
        "conv": _grid(file, f"{prefix}conv1d.weight", (*grid, kernel)),
    }
    options = EngramOptions(
        width=width,
        branches=streams,
        head_width=table.width,
        conv_kernel=kernel,
        conv_dilation=len(multipliers),
        gate_eps=eps,
        conv_eps=eps,
    )
    seed = keys.integer("ple.seed", _QWEN_SEED)
    drawn = splitmix64_multipliers(seed, 0, source.vocabulary.size, len(multipliers))
    regenerated = HashConstants.regenerate(drawn, _regenerated_primes(primes, 1)[0], table.rows)
    stored = HashConstants(multipliers, primes, keys.integers("ple.head_offsets"), table.rows)
    _require_products(file, multipliers, source.vocabulary)
    ngram_hash = NgramHash(source.vocabulary, multipliers, primes, eos, boundary="reset", eos=eos)
    return _site(source, "qwen4_exp", blocks[0], ngram_hash, options, weights, table, regenerated, stored)


# -- DeepSeek --------------------------------------------------------------------------------------------------------


def _v41_vocabulary(file: GgufFile, tokenizer: Tokenizer | None) -> CompressedVocabulary:
    token_map = np.array(_Keys(file, "deepseek41.").integers("engram.token_map"), dtype=np.int64)
    if not len(token_map) or len(np.unique(token_map)) != token_map.max() + 1 or token_map.min() != 0:
        raise AdapterError(f"{file.path}: expected an engram.token_map onto the ids 0, 1, 2, ..., found gaps")
    if tokenizer is not None:
        vocabulary = CompressedVocabulary.from_tokenizer(tokenizer)
        if not np.array_equal(vocabulary.token_map, token_map):
            raise AdapterError(
                f"{file.path}: expected the {TOKENIZER} beside it to compress as engram.token_map does "
                f"({len(token_map)} tokens onto {token_map.max() + 1}), "
                f"found {vocabulary.raw_size} onto {vocabulary.size}"
            )
        return vocabulary
    return CompressedVocabulary(token_map, tuple(map(str, range(int(token_map.max()) + 1))))


def _v41_sites(source: _Source) -> list[EngramSite]:
    file, vocabulary = source.file, source.vocabulary
    keys = _Keys(file, "deepseek41.")
    blocks, multipliers = keys.integers("engram.layer_ids"), keys.integers("engram.multipliers")
    sizes, pad, eps = keys.integers("engram.primes"), keys.integer("engram.pad_id"), keys.number(_EPS, _V41_EPS)
    count = len(blocks)
    if not count or len(set(blocks)) != count or len(multipliers) % count or len(sizes) % count:
        raise AdapterError(
            f"{file.path}: expected multipliers and primes for each of the engram.layer_ids {list(blocks)}, "
            f"found {len(multipliers)} and {len(sizes)}"
        )
    if not 0 <= pad < vocabulary.size:
        raise AdapterError(f"{file.path}: expected a compressed engram.pad_id below {vocabulary.size}, found {pad}")
    window, slots = len(multipliers) // count, len(sizes) // count
    heads = slots // max(window - 1, 1)
    all_primes = [_by_order(file, sizes[i * slots : (i + 1) * slots], window - 1, heads) for i in range(count)]
    regenerated = _regenerated_primes(all_primes[0], count)
    offsets = keys.integers("engram.offsets", ())
    sites = []
    for i, (block, primes) in enumerate(zip(blocks, all_primes, strict=True)):
        own = multipliers[i * window : (i + 1) * window]
        stored = HashConstants(own, primes, offsets[i * slots : (i + 1) * slots] or None)
        constants = HashConstants.regenerate(pcg64_multipliers(0, block, vocabulary.size, window), regenerated[i])
        _require_products(file, own, vocabulary)
        ngram_hash = NgramHash(vocabulary, own, primes, pad)
        sites.append(_v41_site(source, block, ngram_hash, eps, constants, stored))
    return sites


def _v41_site(
    source: _Source, block: int, ngram_hash: NgramHash, eps: float, regenerated: HashConstants, stored: HashConstants
) -> EngramSite:
    file, prefix = source.file, f"blk.{block}.engram_"
    table = file.rows(f"{prefix}embd.weight")
    query, key = (_tensor(file, f"{prefix}{name}.weight") for name in ("q", "k"))
    if query.ndim != 2:
        raise AdapterError(
            f"{file.path}: {prefix}q.weight: expected a shape [streams, width], found {list(query.shape)}"
        )
    m, d = query.shape
    wkv = _tensor(file, f"{prefix}wkv.weight")
    weights = {
        "key_proj.weight": wkv[: m * d],
        "value_proj.weight": wkv[m * d :],
        "query_norm": query,
        "key_norm": key,
    }
    options = EngramOptions(
        width=d, branches=m, head_width=table.width, gate="signed_root_copysign", conv_kernel=0, gate_eps=eps
    )
    return _site(source, "deepseek_v41", block, ngram_hash, options, weights, table, regenerated, stored)


# -- both ------------------------------------------------------------------------------------------------------------


def _site(
    source: _Source,
    variant: str,
    block: int,
    ngram_hash: NgramHash,
    options: EngramOptions,
    weights: Mapping[str, Tensor],
    table: RowReader,
    regenerated: HashConstants,
    stored: HashConstants,
) -> EngramSite:
    engram = assemble_engram(ngram_hash, options, weights, table, resident_bytes=source.resident_bytes)
    return site_of_engram(
        block, engram, variant, streams=options.branches, regenerated=regenerated, stored=stored, rows=table,
        numbered_rows=True,
    )  # fmt: skip


class _Keys:
    """Metadata under one prefix, as plain numbers."""

    def __init__(self, file: GgufFile, prefix: str) -> None:
        self._file, self._prefix = file, prefix

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise AdapterError(f"{self._file.path}: {self._prefix}{key}: expected an integer, found {str(value)[:60]}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if not isinstance(value, float) or not 0 < value < 1:
            raise AdapterError(f"{self._file.path}: {self._prefix}{key}: expected a number in (0, 1), found {value!r}")
        return value

    def integers(self, key: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        value = self._value(key, default)
        if isinstance(value, tuple):
            return value
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or (len(value) and value.max() >= 2**63):
            raise AdapterError(
                f"{self._file.path}: {self._prefix}{key}: expected an array of integers, found {str(value)[:60]}"
            )
        return tuple(value.tolist())

    def _value(self, key: str, default: object) -> MetadataValue | tuple[int, ...]:
        value = self._file.metadata.get(self._prefix + key, default)
        if value is None:
            raise AdapterError(f"{self._file.path}: expected the key {self._prefix}{key}, found none of that name")
        return value  # type: ignore[return-value]


def _by_order(file: GgufFile, sizes: tuple[int, ...], orders: int, heads: int) -> tuple[tuple[int, ...], ...]:
    if orders < 1 or heads < 1 or len(sizes) != orders * heads or min(sizes) < 2:
        raise AdapterError(
            f"{file.path}: expected {orders} orders of {heads} heads of at least 2 rows, found {len(sizes)} sizes"
        )
    return tuple(sizes[i : i + heads] for i in range(0, len(sizes), heads))


def _regenerated_primes(first: tuple[tuple[int, ...], ...], count: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """The primes from the first one on, dealt out as both programs do; the file does not hold where they start."""
    return assign_primes([first[0][0]] * len(first), len(first[0]), count)


def _require_products(file: GgufFile, multipliers: tuple[int, ...], vocabulary: CompressedVocabulary) -> None:
    if min(multipliers) < 1 or max(multipliers) * (vocabulary.size - 1) >= 2**63:
        raise AdapterError(
            f"{file.path}: expected multipliers in [1, {2**63 // max(vocabulary.size - 1, 1)}], so that no product "
            f"overflows, found {list(multipliers)}"
        )


def _tensor(file: GgufFile, name: str) -> Tensor:
    tensor = torch.from_numpy(file.tensor(name))
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{file.path}: {name} holds values that are not finite")
    return tensor


def _grid(file: GgufFile, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = _tensor(file, name)
    if tensor.numel() != int(np.prod(shape)):
        raise AdapterError(f"{file.path}: {name}: expected {list(shape)} values, found {list(tensor.shape)}")
    return tensor.reshape(shape)
