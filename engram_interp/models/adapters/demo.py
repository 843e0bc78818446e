"""How are the modules of the published Engram demo opened?

Two forms: a folder with `config.json` (the demo's `engram` and `backbone` sections), `tokenizer.json` and safetensors
whose names end in the demo's own (`...{layer}....multi_head_embedding.embedding.weight`, `key_projs.{m}`, ...); or a
recording, an `.npz` with `L{layer}.state.*` and `token_map` beside a `.json` of the same stem. The demo mocks
attention and experts, so its memories are opened without a model around them. Constants are regenerated and compared
with what is stored.
Misleads: the demo counts layers from 0 and the paper from 1.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tokenizers import Tokenizer

from engram_interp.memory import CompressedVocabulary, EngramOptions, NgramHash, assign_primes, pcg64_multipliers
from engram_interp.memory.demo import OFFSETS, DemoStateError, engram_from_demo
from engram_interp.models.adapters.hooked import StandaloneMemory
from engram_interp.models.adapters.tensors import AdapterError, TensorFiles, fingerprint, read_config, read_json
from engram_interp.models.checkpoint import CONFIG, TOKENIZER, load_tokenizer
from engram_interp.models.protocol import ModelIdentity
from engram_interp.models.site import EngramSite, HashConstants, site_of_engram
from engram_interp.shapes import Tensor

CONFIG_SECTIONS = ("engram", "backbone")
_TABLE = re.compile(
    r"^(?P<prefix>(?:.*\.)?(?:\D*)(?P<layer>\d+)\.(?:[A-Za-z_]+\.)*)multi_head_embedding\.embedding\.weight$"
)


class _Memory(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    max_ngram_size: int = Field(ge=2, le=64)
    n_embed_per_ngram: int = Field(ge=1)
    n_head_per_ngram: int = Field(ge=1, le=1024)
    layer_ids: tuple[int, ...] = Field(min_length=1, max_length=4096)
    pad_id: int = Field(ge=0)
    seed: int = Field(ge=0)
    kernel_size: int = Field(ge=1, le=1024)
    engram_vocab_size: tuple[int, ...]

    @model_validator(mode="after")
    def _consistent(self) -> _Memory:
        if len(self.engram_vocab_size) != self.max_ngram_size - 1:
            raise ValueError(
                f"expected {self.max_ngram_size - 1} engram_vocab_size, found {len(self.engram_vocab_size)}"
            )
        if min(self.engram_vocab_size) < 2 or max(self.engram_vocab_size) >= 2**50:
            raise ValueError(f"expected engram_vocab_size in [2, 2^50), found {list(self.engram_vocab_size)}")
        if self.n_embed_per_ngram % self.n_head_per_ngram:
            raise ValueError("expected n_embed_per_ngram divisible by n_head_per_ngram")
        return self


class _Backbone(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    hidden_size: int = Field(ge=1)
    hc_mult: int = Field(ge=1, le=1024)


class DemoConfig(BaseModel):
    """The two sections of the demo's configuration, and the compressed size if it is recorded."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    engram: _Memory
    backbone: _Backbone
    compressed_vocab_size: int | None = None


@dataclass(frozen=True, eq=False)
class _Source:
    name: str
    config: DemoConfig
    tokenizer: Tokenizer | None
    vocabulary: CompressedVocabulary
    states: Mapping[int, Mapping[str, Tensor]]
    stored: Mapping[int, HashConstants]
    digest: str


def open_demo(path: Path) -> StandaloneMemory:
    """Open the memories of a demo folder, or of a recording (`.npz`).

    Raises: AdapterError for anything missing, extra, misshaped, damaged, or constants that the configuration
        contradicts.
    """
    source = _read_recording(path) if path.suffix == ".npz" else _read_folder(path)
    config, vocabulary = source.config, source.vocabulary
    if config.compressed_vocab_size not in (None, vocabulary.size):
        raise AdapterError(
            f"{path}: config says compressed_vocab_size {config.compressed_vocab_size}, "
            f"the token map has {vocabulary.size}"
        )
    if config.engram.pad_id >= vocabulary.raw_size:
        raise AdapterError(f"{path}: expected a pad_id below {vocabulary.raw_size}, found {config.engram.pad_id}")
    if missing := sorted(set(config.engram.layer_ids) ^ set(source.states)):
        raise AdapterError(
            f"{path}: expected weights of layers {list(config.engram.layer_ids)}, differs at {missing[0]}"
        )
    layers = config.engram.layer_ids
    primes = assign_primes(config.engram.engram_vocab_size, config.engram.n_head_per_ngram, len(layers))
    sites = [_open_site(source, layer, layer_primes) for layer, layer_primes in zip(layers, primes, strict=True)]
    identity = ModelIdentity(source.name, source.digest, path.name, "demo")
    return StandaloneMemory(sites, source.tokenizer, identity)


def _open_site(source: _Source, layer: int, primes: tuple[tuple[int, ...], ...]) -> EngramSite:
    memory, state, vocabulary = source.config.engram, source.states[layer], source.vocabulary
    multipliers = pcg64_multipliers(memory.seed, layer, vocabulary.size, memory.max_ngram_size)
    ngram_hash = NgramHash(vocabulary, multipliers, primes, int(vocabulary.token_map[memory.pad_id]))
    options = EngramOptions(
        width=source.config.backbone.hidden_size,
        branches=source.config.backbone.hc_mult,
        head_width=memory.n_embed_per_ngram // memory.n_head_per_ngram,
        biases="value_proj.bias" in state,
        conv_kernel=memory.kernel_size,
    )
    try:
        engram = engram_from_demo(state, ngram_hash, options).eval()
    except DemoStateError as error:
        raise AdapterError(f"{source.name}: layer {layer}: {error}") from None
    constants = HashConstants.regenerate(multipliers, primes)
    return site_of_engram(
        layer, engram, "demo", streams=options.branches, regenerated=constants, stored=source.stored[layer]
    )


def _read_folder(path: Path) -> _Source:
    config = read_config(DemoConfig, read_json(path / CONFIG), path / CONFIG)
    files = TensorFiles(path)
    prefixes: dict[int, str] = {}
    for name in files.names:
        if match := _TABLE.match(name):
            layer = int(match["layer"])
            if prefixes.setdefault(layer, match["prefix"]) != match["prefix"]:
                raise AdapterError(
                    f"{path}: layer {layer} is stored twice, under {prefixes[layer]!r} and {match['prefix']!r}"
                )
    states = {
        layer: {
            name.removeprefix(prefix): files.integers(name) if name.endswith(OFFSETS) else files.floats(name)
            for name in files.names
            if name.startswith(prefix)
        }
        for layer, prefix in prefixes.items()
    }
    tokenizer = load_tokenizer(path)
    vocabulary = CompressedVocabulary.from_tokenizer(tokenizer)
    stored = {layer: HashConstants(offsets=_offsets(state)) for layer, state in states.items()}
    return _Source(path.resolve().name, config, tokenizer, vocabulary, states, stored, fingerprint(files.files))


def _read_recording(path: Path) -> _Source:
    config = read_config(DemoConfig, read_json(path.with_suffix(".json")), path.with_suffix(".json"))
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind in "if"}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, TypeError) as error:
        raise AdapterError(f"{path}: not a readable .npz without pickled objects ({error})") from None
    if "token_map" not in arrays:
        raise AdapterError(f"{path}: expected an array 'token_map', found none of that name")
    states: dict[int, dict[str, Tensor]] = {}
    for name, array in arrays.items():
        if match := re.match(r"^L(\d+)\.state\.(.+)$", name):
            states.setdefault(int(match[1]), {})[match[2]] = array
    stored = {layer: _recorded_constants(arrays, layer, state) for layer, state in states.items()}
    token_map = arrays["token_map"].numpy()
    texts = tuple(map(str, range(int(token_map.max()) + 1)))  # a recording holds no texts
    tokenizer = load_tokenizer(path.parent) if (path.parent / TOKENIZER).is_file() else None
    vocabulary = CompressedVocabulary(token_map, texts)
    return _Source(path.stem, config, tokenizer, vocabulary, states, stored, fingerprint([path]))


def _recorded_constants(arrays: Mapping[str, Tensor], layer: int, state: Mapping[str, Tensor]) -> HashConstants:
    multipliers, primes = arrays.get(f"L{layer}.multipliers"), arrays.get(f"L{layer}.primes")
    return HashConstants(
        None if multipliers is None else tuple(multipliers.tolist()),
        None if primes is None else tuple(map(tuple, primes.tolist())),
        _offsets(state),
    )


def _offsets(state: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    return tuple(state[OFFSETS].tolist()) if OFFSETS in state else None
