"""Tiny random checkpoints in other people's layouts: Qwen3.8-Flash-Next by transformers' own class, DeepSeek-V4.1's raw
shards, engram-peft adapters and base models for them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from engram_interp.memory import CompressedVocabulary, assign_primes

EOS = 1


def qwen_config(vocab_size: int, **changes):
    """A small text configuration in which every kind of layer occurs."""
    from transformers import Qwen4ExpTextConfig

    values = {
        "vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "hc_count": 4,
        "hc_lowrank": 8,
        "ple_layer_ids": [2], "ple_embed_dim": 32, "heads_per_ngram": 4, "ngram_size": 3, "ngram_vocab_size_base": 101,
        "make_ngram_vocab_size_divisible_by": 16, "split_ngram_parts": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 4, "eos_token_id": EOS,
        "max_position_embeddings": 128,
    }  # fmt: skip
    return Qwen4ExpTextConfig(**(values | changes))


def qwen_host(vocab_size: int, seed: int = 3, **changes):
    """A random `Qwen4ExpForCausalLM` in which the convolution and the gains are not at their starting values."""
    from transformers import Qwen4ExpForCausalLM

    torch.manual_seed(seed)  # transformers draws its weights from the global generator
    host = Qwen4ExpForCausalLM(qwen_config(vocab_size, **changes)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in host.model.layers:
        if layer.ple is None:
            continue
        for name, parameter in layer.ple.named_parameters():
            std = 0.2 if "norm_" in name else 0.5
            parameter.normal_(0, std, generator=generator)
    return host


SHAPES = {
    "toy": {"width": 64, "hc_mult": 4, "layer_ids": [1, 2], "max_order": 4, "heads": 2, "head_dim": 32, "rows": 97},
    "two streams, bigrams": {
        "width": 32, "hc_mult": 2, "layer_ids": [0], "max_order": 2, "heads": 3, "head_dim": 64, "rows": 53,
    },
    "one stream, narrow rows": {
        "width": 48, "hc_mult": 1, "layer_ids": [3, 0], "max_order": 3, "heads": 1, "head_dim": 16, "rows": 211,
    },
}  # fmt: skip


def config_of(shape: dict, tokenizer: Tokenizer) -> dict[str, object]:
    """`config.json` with the keys of the release."""
    primes = assign_primes([shape["rows"]] * (shape["max_order"] - 1), shape["heads"], len(shape["layer_ids"]))
    return {
        "model_type": "deepseek_v41", "vocab_size": tokenizer.get_vocab_size(), "hidden_size": shape["width"],
        "num_hidden_layers": 4, "hc_mult": shape["hc_mult"], "rms_norm_eps": 1e-20,
        "engram_layer_ids": shape["layer_ids"],
        "engram_num_embeddings": [sum(sum(order) for order in layer) for layer in primes],
        "engram_max_ngram_size": shape["max_order"], "engram_vocab_size": shape["rows"],
        "engram_n_heads": shape["heads"],
        "engram_head_dim": shape["head_dim"], "engram_pad_token_id": 2,
        "engram_compressed_vocab_size": CompressedVocabulary.from_tokenizer(tokenizer).size,
    }  # fmt: skip


def fp8(generator: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Random E4M3 numbers of both signs, without the two codes for not-a-number and below 2."""
    codes = generator.integers(0, 64, shape).astype(np.uint8) | (generator.integers(0, 2, shape).astype(np.uint8) << 7)
    return torch.from_numpy(codes).view(torch.float8_e4m3fn)


def e8m0(generator: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Random powers of two around 1."""
    return torch.from_numpy(generator.integers(125, 130, shape).astype(np.uint8)).view(torch.float8_e8m0fnu)


def write_checkpoint(directory: Path, shape: dict, tokenizer: Tokenizer, seed: int = 7) -> dict[str, torch.Tensor]:
    """A checkpoint of random weights, one shard per memory and one that is never there; returns all tensors."""
    config, rng = config_of(shape, tokenizer), np.random.default_rng(seed)
    m, d = shape["hc_mult"], shape["width"]
    mem = (shape["max_order"] - 1) * shape["heads"] * shape["head_dim"]
    blocks = lambda size: math.ceil(size / 32)  # noqa: E731
    tensors, weight_map = {}, {"layers.0.attn.wq_a.weight": "model-00001-of-00009.safetensors"}
    for i, (layer, rows) in enumerate(zip(shape["layer_ids"], config["engram_num_embeddings"], strict=True)):
        prefix = f"layers.{layer}.engram."
        shard = {
            f"{prefix}embed.weight": fp8(rng, (rows, shape["head_dim"])),
            f"{prefix}embed.scale": e8m0(rng, (rows, blocks(shape["head_dim"]))),
            f"{prefix}wkv.weight": fp8(rng, ((m + 1) * d, mem)),
            f"{prefix}wkv.scale": e8m0(rng, (blocks((m + 1) * d), blocks(mem))),
            f"{prefix}q_weight": torch.from_numpy(rng.normal(1, 0.3, (m, d))).to(torch.bfloat16),
            f"{prefix}k_weight": torch.from_numpy(rng.normal(1, 0.3, (m, d))).to(torch.bfloat16),
        }
        name = f"model-0000{i + 2}-of-00009.safetensors"
        save_file(shard, directory / name)
        weight_map |= dict.fromkeys(shard, name)
        tensors |= shard
    head = {"head.weight": torch.from_numpy(rng.normal(size=(tokenizer.get_vocab_size(), d))).to(torch.bfloat16)}
    save_file(head, directory / "model-00009-of-00009.safetensors")
    weight_map["head.weight"] = "model-00009-of-00009.safetensors"
    tensors |= head
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    return tensors


PEFT_SHAPES = {
    "as recorded": {"blocks": [1, 2], "orders": [2, 3], "heads": 4, "sizes": [800, 800], "mem": 32, "branches": 4},
    "four-grams, one branch": {"blocks": [0], "orders": [2, 3, 4], "heads": 2, "sizes": [90, 110, 210], "mem": 24,
                               "branches": 1},
    "last block first, two branches": {"blocks": [2, 0], "orders": [2], "heads": 3, "sizes": [300], "mem": 12,
                                       "branches": 2},
}  # fmt: skip
WIDTH, LAYERS, KERNEL = 32, 3, 3


BASES = {
    "Llama": {},
    "GPT2": {"n_inner": 48},
    "GPTNeoX": {},
    "Gemma2": {"head_dim": 16, "final_logit_softcapping": 5.0},
    "Granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "Qwen2Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                 "shared_expert_intermediate_size": 16},
}  # fmt: skip


def write_base(directory: Path, tokenizer: Tokenizer, kind: str = "Llama", layers: int = LAYERS) -> Path:
    """A tiny random model as transformers saves it."""
    import transformers

    torch.manual_seed(4)  # transformers draws its weights from the global generator
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2,
        **BASES[kind],
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    return directory


def write_adapter(
    directory: Path, shape: dict, tokenizer: Tokenizer, *, width: int = WIDTH, container: str | None = "model.layers"
) -> Path:
    """A random adapter in engram-peft's layout."""
    rng, m = np.random.default_rng(6), shape["branches"]
    draw = lambda *size, mean=0.0: torch.from_numpy(rng.normal(mean, 0.4, size)).float()  # noqa: E731
    starts = [size // shape["heads"] for size in shape["sizes"]]
    primes = assign_primes(starts, shape["heads"], len(shape["blocks"]))
    tensors = {}
    for block, block_primes in zip(sorted(shape["blocks"]), primes, strict=True):
        sizes = [prime for order in block_primes for prime in order]
        tensors |= {
            f"{block}.multi_head_embedding.offsets": torch.tensor(np.cumsum([0, *sizes[:-1]])),
            f"{block}.multi_head_embedding.embedding.weight": draw(sum(sizes), shape["mem"] // len(sizes)),
            f"{block}.gating.w_v.weight": draw(width, shape["mem"]),
            f"{block}.short_conv.conv.weight": draw(m * width, 1, KERNEL),
        }
        for i in range(m):
            tensors[f"{block}.gating.w_k.{i}.weight"] = draw(width, shape["mem"])
            for norm in ("gating.norm_h", "gating.norm_k", "short_conv.norms"):
                tensors[f"{block}.{norm}.{i}.weight"] = draw(width, mean=1.0)
    save_file(tensors, directory / "engram_adapters.safetensors", {"format": "engram-peft"})
    config = {
        "model_type": "engram", "engine": "deepseek", "target_layers": shape["blocks"], "ngram_sizes": shape["orders"],
        "n_head_per_ngram": shape["heads"], "engram_vocab_size_per_ngram": shape["sizes"],
        "embedding_dim": shape["mem"],
        "hidden_size": width, "hc_mult": m, "conv_kernel_size": KERNEL, "conv_dilation": None,
        "compressed_vocab_size": CompressedVocabulary.from_tokenizer(tokenizer).size,
        "enable_tokenizer_compression": True, "pad_id": 2, "seed": 3, "layer_container_path": container,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory
