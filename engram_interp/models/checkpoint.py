"""How is a model kept on disk, and how is it known to be the same one?

A checkpoint is a directory: `config.json`, `model.safetensors`, `tokenizer.json`, a model card. Loading is strict in
both directions and never unpickles: a missing, extra, misshaped or truncated tensor, or an unknown key, is an error
that says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from engram_interp.models.config import ModelConfig
from engram_interp.models.house import HouseModel, hashed_vocabulary
from engram_interp.models.protocol import ModelIdentity
from engram_interp.runs.atomic import write_atomically as replace_atomically
from engram_interp.shapes import Tensor

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded or saved; the message names what was expected and what was found."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """As `runs.atomic.write_atomically`; a disk that refuses is a CheckpointError, and the old file stays whole."""
    try:
        replace_atomically(path, write)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not saved, the previous file is untouched ({error})") from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda part: save_file(contiguous, part, dict(metadata or {})))


def read_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read exactly the expected tensors.

    Args: expected: names and shapes that must be there (values are not used).
    Raises: CheckpointError for a missing or damaged file, a missing or extra tensor, or a wrong shape.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
            if missing := sorted(set(expected) - found):
                raise CheckpointError(f"{path}: missing {len(missing)} tensors, the first is {missing[0]!r}")
            if extra := sorted(found - set(expected)):
                raise CheckpointError(f"{path}: {len(extra)} unexpected tensors, the first is {extra[0]!r}")
            return {name: _read_one(file, name, expected[name], path) for name in expected}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged or truncated ({error})") from None


def _read_one(file: object, name: str, like: Tensor, path: Path) -> Tensor:
    shape = tuple(file.get_slice(name).get_shape())  # type: ignore[attr-defined]
    if shape != tuple(like.shape):
        raise CheckpointError(f"{path}: {name!r} should have shape {tuple(like.shape)}, found {shape}")
    tensor = file.get_tensor(name)  # type: ignore[attr-defined]
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{path}: {name!r} holds values that are not finite")
    return tensor


def weights_hash(path: Path) -> str:
    """SHA-256 of a weight file: the identity of a model in every result."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_model(model: HouseModel, tokenizer: Tokenizer, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a checkpoint directory; the weights go last, each file atomically.

    Raises: CheckpointError when the disk is full; the previous files stay whole.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / TOKENIZER, lambda part: _write_text(part, tokenizer.to_str()))
    write_atomically(directory / CONFIG, lambda part: _write_text(part, model.cfg.model_dump_json(indent=2)))
    save_tensors(directory / WEIGHTS, {k: v.to(dtype) for k, v in model.state_dict().items()})


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def load_config(directory: Path) -> ModelConfig:
    """Read `config.json`.

    Raises: CheckpointError naming each missing, unknown or ill-typed key.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{directory}: not a checkpoint, {CONFIG} is missing")
    try:
        return ModelConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise CheckpointError(f"{path}: {problems}") from None


def load_tokenizer(directory: Path) -> Tokenizer:
    """Read `tokenizer.json`.

    Raises: CheckpointError when it is missing or damaged.
    """
    path = directory / TOKENIZER
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # noqa: BLE001 - tokenizers raises bare Exception
        raise CheckpointError(f"{path}: not a tokenizer ({error})") from None


def load_model(directory: Path) -> HouseModel:
    """Open a checkpoint in float32, ready for inference (no gradients).

    Raises: CheckpointError for anything missing, extra, misshaped, truncated or unknown.
    """
    config, tokenizer = load_config(directory), load_tokenizer(directory)
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise CheckpointError(
            f"{directory}: config says {config.vocab_size} tokens, the tokenizer has {tokenizer.get_vocab_size()}"
        )
    if not (directory / WEIGHTS).is_file():
        raise CheckpointError(f"{directory / WEIGHTS}: no such file")
    try:
        identity = ModelIdentity(config.name, weights_hash(directory / WEIGHTS), directory.name, "house")
        model = HouseModel(config, hashed_vocabulary(config, tokenizer), tokenizer, identity)
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    state = read_tensors(directory / WEIGHTS, model.state_dict())
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
    return model.eval().requires_grad_(False)
