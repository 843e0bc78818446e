"""Does this code compute what the published demo computed?

A recording is two files of one stem: `.json` (the demo's configuration) and `.npz` (per layer L: `L{L}.hash_ids`,
`multipliers`, `primes`, `hidden_in`, `output`, and the demo's parameters `L{L}.state.*`; once: `input_ids`,
`token_map`). Everything is recomputed from the tokenizer and the configuration alone: token map, multipliers, primes,
offsets and addresses must be equal, outputs within 1e-5. Each quantity is compared with our own upstream values, so one
wrong number in a recording is blamed on itself. Misleads: in float32 a score within 1e-6 of zero sits at the gate's
singularity and may exceed the bound.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from engram_interp.memory.compress import CompressedVocabulary
from engram_interp.memory.demo import OFFSETS, DemoStateError, engram_from_demo
from engram_interp.memory.engram import EngramOptions
from engram_interp.memory.hashing import NgramHash, assign_primes, pcg64_multipliers
from engram_interp.shapes import Shaped, Tensor

TOLERANCE = 1e-5

Array = Shaped[np.ndarray, "..."]


class RecordingError(ValueError):
    """A recording that cannot be compared; the message names the file or key, what was expected and what was found."""


@dataclass(frozen=True)
class RecordedRow:
    """One compared quantity. `layer` None: shared by all layers; `index`, `expected`, `found`: the worst element."""

    layer: int | None
    quantity: str
    worst: float
    index: tuple[int, ...]
    expected: int | float
    found: int | float
    ok: bool

    @property
    def line(self) -> str:
        """The row as one line of text."""
        where = "all layers" if self.layer is None else f"layer {self.layer}"
        if self.ok:
            return f"ok    {where}, {self.quantity}: worst difference {self.worst:.3g}"
        return (
            f"WRONG {where}, {self.quantity}: worst element {list(self.index)} is {self.found}, "
            f"recorded {self.expected}, difference {self.worst:.9g}"
        )


@dataclass(frozen=True)
class RecordedComparison:
    """Every quantity of a recording beside our own."""

    recording: str
    rows: tuple[RecordedRow, ...]

    @property
    def ok(self) -> bool:
        """Whether all of them agree."""
        return all(row.ok for row in self.rows)


@dataclass(frozen=True)
class _Recording:
    """The part of the demo's configuration that decides what a layer computes, and the recorded arrays."""

    name: str
    layers: tuple[int, ...]
    orders: int
    rows_per_head: tuple[int, ...]
    heads: int
    pad_id: int
    seed: int
    compressed: int | None
    options: EngramOptions
    arrays: Mapping[str, Array]

    def array(self, name: str) -> Array:
        """A recorded array by its full name."""
        if name not in self.arrays:
            raise RecordingError(f"{self.name}: expected an array {name!r}, found none of that name")
        return self.arrays[name]


def compare_recorded(vectors: Path, tokenizer: Path) -> RecordedComparison:
    """Recompute a recorded run of the published demo.

    Args: vectors: the stem of the `.json` and `.npz`, or either of them; tokenizer: the `tokenizer.json` it was run
    with. Raises: RecordingError for a missing or damaged file, a missing key, an extra or misshaped weight.
    """
    recording = _read(vectors)
    vocabulary = CompressedVocabulary.from_tokenizer(_read_tokenizer(tokenizer))
    return RecordedComparison(recording.name, tuple(_rows(recording, vocabulary)))


def run_vectors_check(vectors: Path, tokenizer: Path) -> int:
    """Print one line per compared quantity; 0 when all agree, else 1."""
    from rich.console import Console

    say = partial(Console().print, markup=False, highlight=False, soft_wrap=True)
    try:
        comparison = compare_recorded(vectors, tokenizer)
    except ValueError as error:
        say(f"error: {error}")
        return 1
    for row in comparison.rows:
        say(row.line)
    wrong = sum(not row.ok for row in comparison.rows)
    say(f"{comparison.recording}: {len(comparison.rows) - wrong} of {len(comparison.rows)} quantities agree")
    return 0 if comparison.ok else 1


# -- comparing -------------------------------------------------------------------------------------------------------


def _rows(recording: _Recording, vocabulary: CompressedVocabulary) -> Iterator[RecordedRow]:
    if recording.compressed is not None:
        yield _row(None, "compressed_vocab_size", np.array(recording.compressed), np.array(vocabulary.size))
    yield _row(None, "token_map", recording.array("token_map"), vocabulary.token_map)
    if not 0 <= recording.pad_id < vocabulary.raw_size:
        raise RecordingError(
            f"{recording.name}: expected a pad_id in [0, {vocabulary.raw_size}), found {recording.pad_id}"
        )
    primes = assign_primes(recording.rows_per_head, recording.heads, len(recording.layers))
    for layer, layer_primes in zip(recording.layers, primes, strict=True):
        multipliers = pcg64_multipliers(recording.seed, layer, vocabulary.size, recording.orders)
        pad = int(vocabulary.token_map[recording.pad_id])
        yield from _layer_rows(recording, layer, NgramHash(vocabulary, multipliers, layer_primes, pad))


def _layer_rows(recording: _Recording, layer: int, ngram_hash: NgramHash) -> Iterator[RecordedRow]:
    recorded = {name: recording.array(f"L{layer}.{name}") for name in ("multipliers", "primes", "hash_ids", "output")}
    prefix = f"L{layer}.state."
    state = {
        name.removeprefix(prefix): torch.from_numpy(array)
        for name, array in recording.arrays.items()
        if name.startswith(prefix)
    }
    offsets = recording.array(prefix + OFFSETS)
    state[OFFSETS] = torch.tensor(ngram_hash.offsets)  # the recorded ones are compared below, the layer uses ours
    tokens = _integers(recording, "input_ids")
    yield _row(layer, "multipliers", recorded["multipliers"], np.array(ngram_hash.multipliers))
    yield _row(layer, "primes", recorded["primes"], np.array(ngram_hash.primes))
    yield _row(layer, "offsets", offsets, np.array(ngram_hash.offsets))
    yield _row(layer, "hash_ids", recorded["hash_ids"], ngram_hash.slots(tokens).numpy())
    yield _row(layer, "output", recorded["output"], _output(recording, layer, state, ngram_hash, tokens), TOLERANCE)


def _output(
    recording: _Recording, layer: int, state: Mapping[str, Tensor], ngram_hash: NgramHash, tokens: Tensor
) -> Array:
    hidden = torch.from_numpy(recording.array(f"L{layer}.hidden_in"))
    expected = (*tokens.shape, recording.options.branches, recording.options.width)
    if tuple(hidden.shape) != expected:
        raise RecordingError(f"layer {layer}, hidden_in: expected shape {expected}, found {tuple(hidden.shape)}")
    try:
        module = engram_from_demo(state, ngram_hash, recording.options)
    except DemoStateError as error:
        raise RecordingError(f"layer {layer}, state: {error}") from None
    with torch.no_grad():
        return module(hidden.to(module.table.weight.dtype), tokens).numpy()


def _row(layer: int | None, quantity: str, expected: Array, found: Array, tolerance: float = 0.0) -> RecordedRow:
    if expected.shape != found.shape:
        where = "all layers" if layer is None else f"layer {layer}"
        raise RecordingError(f"{where}, {quantity}: expected shape {found.shape}, recorded {expected.shape}")
    difference = np.abs(expected.astype(np.float64) - found.astype(np.float64))
    difference = np.where((expected != found) & (difference == 0), 1.0, difference)  # integers beyond 2^53
    difference = np.where(np.isnan(difference), np.inf, difference)
    index = tuple(int(i) for i in np.unravel_index(np.argmax(difference), difference.shape))
    left, right = expected[index].item(), found[index].item()
    worst = float(difference[index])
    return RecordedRow(layer, quantity, worst, index, left, right, worst <= tolerance)


# -- reading ---------------------------------------------------------------------------------------------------------


def _read(vectors: Path) -> _Recording:
    stem = vectors.with_suffix("") if vectors.suffix in (".npz", ".json") else vectors
    config = _read_json(stem.with_name(stem.name + ".json"))
    name = stem.name
    engram, backbone = _section(config, "engram", name), _section(config, "backbone", name)
    get = lambda key: _integer(engram, key, name)  # noqa: E731
    orders, heads, columns = get("max_ngram_size"), get("n_head_per_ngram"), get("n_embed_per_ngram")
    sizes = _integer_list(engram, "engram_vocab_size", name)
    if orders < 2 or heads < 1 or len(sizes) != orders - 1 or columns % heads:
        raise RecordingError(
            f"{name}: expected an engram_vocab_size per order from 2 to max_ngram_size and n_embed_per_ngram divisible "
            f"by n_head_per_ngram, found {list(sizes)}, {orders}, {columns} / {heads}"
        )
    options = EngramOptions(
        width=_integer(backbone, "hidden_size", name),
        branches=_integer(backbone, "hc_mult", name),
        head_width=columns // heads,
        biases=True,
        conv_kernel=get("kernel_size"),
    )
    compressed = _integer(config, "compressed_vocab_size", name) if "compressed_vocab_size" in config else None
    layers, arrays = _integer_list(engram, "layer_ids", name), _read_arrays(stem.with_name(name + ".npz"))
    return _Recording(name, layers, orders, sizes, heads, get("pad_id"), get("seed"), compressed, options, arrays)


def _read_json(path: Path) -> Mapping[str, object]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordingError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise RecordingError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise RecordingError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def _read_arrays(path: Path) -> dict[str, Array]:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise RecordingError(f"{path}: not a readable .npz without pickled objects ({error})") from None


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise RecordingError(f"{path}: no such tokenizer file")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - tokenizers raises bare Exception
        raise RecordingError(f"{path}: not a tokenizer ({error})") from None


def _section(config: Mapping[str, object], key: str, name: str) -> Mapping[str, object]:
    section = config.get(key)
    if not isinstance(section, dict):
        raise RecordingError(f"{name}: expected an object under {key!r}, found {type(section).__name__}")
    return section


def _integer(section: Mapping[str, object], key: str, name: str) -> int:
    value = section.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise RecordingError(f"{name}: expected an integer under {key!r}, found {value!r}")
    return value


def _integer_list(section: Mapping[str, object], key: str, name: str) -> tuple[int, ...]:
    value = section.get(key)
    if not isinstance(value, list) or not value or not all(type(item) is int for item in value):
        raise RecordingError(f"{name}: expected a list of integers under {key!r}, found {value!r}")
    return tuple(value)


def _integers(recording: _Recording, name: str) -> Tensor:
    array = recording.array(name)
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise RecordingError(
            f"{recording.name}: expected integers [B, T] under {name!r}, found {array.dtype} {array.shape}"
        )
    return torch.from_numpy(array.astype(np.int64))
