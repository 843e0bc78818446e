"""The house model as a Hugging Face model: how is it handed to somebody who has only transformers?

`export_huggingface` writes a directory (`config.json`, `model.safetensors`, `tokenizer.json`, `tokenizer_config.json`)
that `EngramHouseForCausalLM.from_pretrained` opens again, bit for bit: the weights are the house model's own, wrapped,
not converted. After `register_huggingface()` the Auto classes open it too. Local directories only; nothing is unpickled
and no code of the directory is run. Cost: one copy of the weights on disk. Misleads: `generate` of transformers is not
offered (use `HouseModel.generate`); weights are float32 whatever `dtype` the rest of a pipeline uses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast, no_type_check

import torch
from pydantic import ValidationError
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from engram_interp.memory import CompressedVocabulary
from engram_interp.models import checkpoint
from engram_interp.models.checkpoint import CheckpointError
from engram_interp.models.config import ModelConfig
from engram_interp.models.house import HouseModel
from engram_interp.models.protocol import ModelIdentity
from engram_interp.shapes import Int64, Tensor

_TOKENIZER_CONFIG = "tokenizer_config.json"
_TIED = "lm_head.weight"  # one tensor with the embedding: not stored
# Options of transformers under which the loaded weights would no longer be the exported ones.
_REFUSED = ("device_map", "quantization_config", "state_dict", "gguf_file", "adapter_name", "revision")


@no_type_check  # transformers lets __init__ take more keywords than the fields its signature shows to a type checker
class EngramHouseConfig(PreTrainedConfig):
    """The fields of `ModelConfig` under transformers' rules; `engram` is a dictionary or None."""

    model_type = "engram_house"
    attribute_map = {  # noqa: RUF012 - transformers reads it from the class
        "hidden_size": "width",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "max_position_embeddings": "context",
        "rms_norm_eps": "norm_eps",
        "intermediate_size": "expert_width",
        "num_experts": "routed_experts",
        "num_experts_per_tok": "active_experts",
    }
    name: str = ""
    vocab_size: int = 0
    context: int = 0
    width: int = 0
    layers: int = 0
    heads: int = 0
    streams: int = 1
    routed_experts: int = 0
    active_experts: int = 0
    expert_width: int = 0
    shared_width: int = 0
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    bos_id: int = 0
    pad_id: int = 2
    bos_token_id: int | None = None  # transformers' names for the two ids above
    pad_token_id: int | None = None
    engram: dict | None = None
    tie_word_embeddings: bool = True

    @classmethod
    def of(cls, config: ModelConfig) -> EngramHouseConfig:
        """The same configuration for transformers."""
        ids = {"bos_token_id": config.bos_id, "pad_token_id": config.pad_id}
        return cls(architectures=["EngramHouseForCausalLM"], **ids, **config.model_dump(mode="json"))

    def house_config(self) -> ModelConfig:
        """The same configuration for `HouseModel`.

        Raises: CheckpointError naming each missing, unknown or ill-typed key.
        """
        fields = set(ModelConfig.model_fields)
        usual = {*vars(PreTrainedConfig()), *vars(EngramHouseConfig()), "model_type", "use_cache"}
        if unknown := sorted(key for key in set(vars(self)) - usual - fields if not key.startswith("_")):
            raise CheckpointError(f"config: {unknown[0]!r} is no field of a house model")
        try:
            return ModelConfig.model_validate_json(json.dumps({key: getattr(self, key) for key in fields}))
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
            raise CheckpointError(f"config: {problems}") from None


class EngramHouseForCausalLM(PreTrainedModel):
    """A house model behind transformers' interface. `model` is the `HouseModel` itself, shared, not copied."""

    config_class = EngramHouseConfig
    base_model_prefix = "model"
    _tied_weights_keys = {_TIED: "model.embed.weight"}  # noqa: RUF012 - transformers reads it from the class

    def __init__(self, config: EngramHouseConfig, house: HouseModel) -> None:
        super().__init__(config)
        self.model = house
        self.lm_head = nn.Linear(house.width, house.vocab_size, bias=False, device="meta")
        self.lm_head.weight = house.embed.weight
        self.post_init()
        self.train(house.training)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the weights are the house model's."""

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module:
        """The unembedding, one tensor with the embedding."""
        return self.lm_head

    def forward(
        self,
        input_ids: Int64[Tensor, "B T"],
        attention_mask: Tensor | None = None,
        *,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutput:
        """Logits [B, T, V] of right-padded or unpadded texts; the memory needs ids, so embeddings are not accepted.

        Raises: ValueError where `HouseModel.forward` does, or for a mask that hides anything but trailing padding.
        """
        if attention_mask is not None and bool((attention_mask.bool() != (input_ids != self.model.cfg.pad_id)).any()):
            raise ValueError("expected attention_mask to hide exactly the padding after the text: n-grams ignore masks")
        with self.model.lock:
            hidden, _ = self.model.streams(input_ids)
            return CausalLMOutput(logits=self.lm_head(self.model.exit_hidden(hidden)))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        directory: str | Path,
        *,
        config: EngramHouseConfig | None = None,
        dtype: torch.dtype | str | None = None,
        **options: object,
    ) -> EngramHouseForCausalLM:
        """Open an exported directory in float32, in evaluation mode, with gradients as transformers opens any model.

        Args: options: what transformers passes along (`attn_implementation`, `token`, ...); it changes nothing here.
        Raises: CheckpointError for anything missing, extra, misshaped, truncated or unknown; ValueError for an option
            that would change the weights.
        """
        dtype = cast("torch.dtype | str | None", options.pop("torch_dtype", None)) or dtype
        if dtype not in (None, "auto", "float32", torch.float32):
            raise ValueError(f"expected dtype float32, found {dtype}: rounded weights give other logits")
        if refused := [name for name in _REFUSED if options.get(name) not in (None, "main")]:
            raise ValueError(f"option {refused[0]!r} is not supported for a house model; open it without")
        directory = Path(directory)
        if not (directory / checkpoint.CONFIG).is_file():
            raise CheckpointError(f"{directory}: expected a local directory with {checkpoint.CONFIG}, found none")
        config = config or _read_config(directory)
        model = cls(config, _house(directory, config.house_config()))
        state = checkpoint.read_tensors(directory / checkpoint.WEIGHTS, _stored(model))
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)  # all but the tie
        return model.eval()


def export_huggingface(model: HouseModel, directory: Path) -> None:
    """Write a house model in Hugging Face form; the weights go last, each file atomically, their values unchanged.

    Raises: ValueError for a model without a tokenizer or hashing with another; CheckpointError when the disk is full.
    """
    if not isinstance(model.tokenizer, Tokenizer):
        raise ValueError("expected a model with its tokenizer, found none: the memory's addresses depend on it")
    token_map = CompressedVocabulary.from_tokenizer(model.tokenizer).token_map
    if model.cfg.engram and token_map.tolist() != model.vocabulary.token_map.tolist():
        raise ValueError("expected the tokenizer the memory was built with, found one that compresses differently")
    wrapped = EngramHouseForCausalLM(EngramHouseConfig.of(model.cfg), model)
    texts = {
        checkpoint.TOKENIZER: model.tokenizer.to_str(),
        _TOKENIZER_CONFIG: json.dumps(_tokenizer_config(model), indent=2),
        checkpoint.CONFIG: wrapped.config.to_json_string(),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        checkpoint.write_atomically(directory / name, lambda part, text=text: _write(part, text))
    checkpoint.save_tensors(directory / checkpoint.WEIGHTS, _stored(wrapped), {"format": "pt"})


def register_huggingface() -> None:
    """Let AutoConfig and AutoModelForCausalLM know `engram_house`; calling it again changes nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoConfig.register(EngramHouseConfig.model_type, EngramHouseConfig, exist_ok=True)
    AutoModelForCausalLM.register(EngramHouseConfig, EngramHouseForCausalLM, exist_ok=True)


def _read_config(directory: Path) -> EngramHouseConfig:
    try:
        return EngramHouseConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{directory / checkpoint.CONFIG}: damaged ({error})") from None


def _house(directory: Path, config: ModelConfig) -> HouseModel:
    tokenizer = checkpoint.load_tokenizer(directory)
    weights = directory / checkpoint.WEIGHTS
    if not weights.is_file():
        raise CheckpointError(f"{weights}: no such file")
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise CheckpointError(
            f"{directory}: config says {config.vocab_size} tokens, the tokenizer has {tokenizer.get_vocab_size()}"
        )
    identity = ModelIdentity(config.name, checkpoint.weights_hash(weights), directory.name, "house")
    try:
        return HouseModel(config, CompressedVocabulary.from_tokenizer(tokenizer), tokenizer, identity)
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}") from None


def _stored(model: EngramHouseForCausalLM) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name != _TIED}


def _tokenizer_config(model: HouseModel) -> dict[str, object]:
    special = {"bos_token": model.cfg.bos_id, "pad_token": model.cfg.pad_id}
    if (eos := model.tokenizer.token_to_id("<eos>")) is not None:
        special["eos_token"] = eos
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.context,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        **{role: model.tokenizer.id_to_token(index) for role, index in special.items()},
    }


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
