"""What kind of model lies in this directory, and how is it opened?

Recognised by `config.json` alone: a house checkpoint (`engram_interp` keys), `model_type` qwen4_exp or deepseek_v41,
an engram-peft adapter (`model_type` engram, or its weight file), the published demo (an `engram` and a `backbone`
section). A GGUF file is recognised by its `general.architecture`. Where a decoder without a memory will do, as a
baseline, any Hugging Face causal language model is one.
"""

from __future__ import annotations

from pathlib import Path

from engram_interp.models.adapters import deepseek_v41, qwen4_exp
from engram_interp.models.adapters.demo import CONFIG_SECTIONS, open_demo
from engram_interp.models.adapters.engram_peft import WEIGHTS as PEFT_WEIGHTS
from engram_interp.models.adapters.engram_peft import open_engram_peft
from engram_interp.models.adapters.gguf_memory import ARCHITECTURES, gguf_architecture, open_gguf_memory
from engram_interp.models.adapters.hooked import HookedMemory
from engram_interp.models.adapters.qwen4_exp_memory import open_qwen4_exp_memory
from engram_interp.models.adapters.tensors import AdapterError, read_json
from engram_interp.models.checkpoint import CONFIG, load_model
from engram_interp.models.config import ModelConfig
from engram_interp.models.house import HouseModel
from engram_interp.models.protocol import Decoder
from engram_interp.models.registry import BUNDLED, load

WHOLE_MODEL_BYTES = 16 * 2**30  # checkpoints beyond this are not loaded whole unless asked to
KINDS = ("house", "deepseek_v41", "qwen4_exp", "engram_peft", "demo", "gguf")


class NoMemoryError(AdapterError):
    """A model that can be read, but is of no kind that has a memory."""


def kind_of(path: Path) -> str:
    """One of `KINDS`.

    Raises: AdapterError listing what was looked for; NoMemoryError for a model of another kind.
    """
    if path.suffix == ".gguf" and path.is_file():
        if (architecture := gguf_architecture(path)) in ARCHITECTURES:
            return "gguf"
        raise NoMemoryError(
            f"{path}: expected a GGUF file of architecture {' or '.join(ARCHITECTURES)}, found {architecture!r}, which "
            "has no memory"
        )
    if path.suffix == ".npz" and path.is_file():
        return "demo"
    if not (path / CONFIG).is_file():
        raise AdapterError(
            f"{path}: expected a model directory with {CONFIG}, a GGUF file, a demo recording (.npz), "
            f"or one of {BUNDLED}"
        )
    values = read_json(path / CONFIG)
    model_type = values.get("model_type")
    if model_type in deepseek_v41.MODEL_TYPES:
        return "deepseek_v41"
    if model_type in qwen4_exp.MODEL_TYPES:
        return "qwen4_exp"
    if model_type == "engram" or (path / PEFT_WEIGHTS).is_file():
        return "engram_peft"
    if all(isinstance(values.get(section), dict) for section in CONFIG_SECTIONS):
        return "demo"
    if {"routed_experts", "active_experts"} <= values.keys() <= ModelConfig.model_fields.keys():
        return "house"
    if "engram_layer_ids" in values and "engram_num_embeddings" in values:  # the release's own inference/config.json
        return "deepseek_v41"
    raise NoMemoryError(
        f"{path / CONFIG}: no known model with a memory (model_type {model_type!r}); looked for a house "
        f"checkpoint (routed_experts, active_experts), model_type {'/'.join(deepseek_v41.MODEL_TYPES)}, "
        f"model_type {'/'.join(qwen4_exp.MODEL_TYPES)}, an engram-peft adapter (model_type engram or {PEFT_WEIGHTS}), "
        f"the demo (sections {' and '.join(CONFIG_SECTIONS)})"
    )


def open_model(
    path: str | Path,
    *,
    base: str | Path | None = None,
    memory_only: bool | None = None,
    device_map: str | None = None,
) -> HouseModel | HookedMemory:
    """Open a bundled model by name, or any recognised directory or file.

    Args: base: the base model's directory or GGUF file, for an engram-peft adapter and nothing else. memory_only: of a
        qwen4_exp checkpoint, open the memories without the model; None does so when its files exceed
        `WHOLE_MODEL_BYTES` and no device_map is given. device_map: where transformers puts the weights of a qwen4_exp model.
    Raises: CheckpointError (AdapterError) with one message that says what was expected and what was found.
    """
    if str(path) in BUNDLED and base is None:
        _refuse_device_map(path, "house", device_map)
        return load(path)
    path = Path(path)
    kind = kind_of(path)
    if (kind == "engram_peft") != (base is not None):
        wanted = "the directory or GGUF file of the base model (--base)" if base is None else "no base model"
        raise AdapterError(f"{path}: a model of kind {kind} needs {wanted}, found {base}")
    if kind == "engram_peft":
        _refuse_device_map(path, kind, device_map)
        return open_engram_peft(path, Path(base))  # type: ignore[arg-type]
    large = device_map is None and _is_large(path)
    if kind == "qwen4_exp" and (large if memory_only is None else memory_only):
        return open_qwen4_exp_memory(path)
    if kind == "qwen4_exp":
        return qwen4_exp.open_qwen4_exp(path, device_map)
    _refuse_device_map(path, kind, device_map)
    opener = {
        "house": load_model,
        "deepseek_v41": deepseek_v41.open_deepseek_v41,
        "demo": open_demo,
        "gguf": open_gguf_memory,
    }[kind]
    return opener(path)


def _refuse_device_map(path: str | Path, kind: str, device_map: str | None) -> None:
    if device_map is not None:
        raise AdapterError(
            f"{path}: expected a Hugging Face model for device_map {device_map!r}, found one of kind {kind}"
        )


def open_decoder(path: str | Path, base: str | Path | None = None, *, device_map: str | None = None) -> Decoder:
    """Open a model that can be read layer by layer: as `open_model` with a backbone around the memories, or any Hugging
    Face causal language model, which has none.

    Args: base: the base model's directory or GGUF file, for an engram-peft adapter and nothing else; device_map: as `load_host`, for
        models that transformers opens.
    Raises: AdapterError (a ValueError) as `open_model`, and when only the memories could be opened.
    """
    try:
        model = open_model(path, base=base, device_map=device_map)
    except NoMemoryError:
        if base is not None or not _transformers_knows(Path(path)):
            raise
        from engram_interp.models.adapters.bridge import load_decoder

        return load_decoder(Path(path), device_map=device_map)
    if not isinstance(model, Decoder):
        raise AdapterError(
            f"{path}: expected a model with its backbone (residuals and unembedding at every layer), found only the "
            f"memories of {model.identity.name!r} ({model.identity.kind}) in blocks {list(model.engram_layers)}"
        )
    return model


def needs_base(path: str | Path) -> bool:
    """Whether a base model must be given to open this one; False for what cannot be recognised."""
    try:
        return str(path) not in BUNDLED and kind_of(Path(path)) == "engram_peft"
    except AdapterError:
        return False


def open_decoders(*paths: str | Path, base: str | Path | None = None) -> tuple[Decoder, ...]:
    """Open several models; `base` goes to those that need one.

    Raises: AdapterError as `open_decoder`, and for a base that none of them needs.
    """
    needing = [needs_base(path) for path in paths]
    if base is not None and not any(needing):
        raise AdapterError(
            f"expected an engram-peft adapter for the base model {base}, found {', '.join(map(str, paths))}"
        )
    return tuple(open_decoder(path, base if needs else None) for path, needs in zip(paths, needing, strict=True))


def _transformers_knows(path: Path) -> bool:
    if path.suffix == ".gguf":
        return True
    from transformers import CONFIG_MAPPING

    return read_json(path / CONFIG).get("model_type") in CONFIG_MAPPING


def _is_large(path: Path) -> bool:
    return sum(file.stat().st_size for file in path.glob("*.safetensors")) > WHOLE_MODEL_BYTES
