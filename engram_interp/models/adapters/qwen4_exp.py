"""How is the memory of Qwen3.8-Flash-Next (`qwen4_exp`) recorded and changed inside transformers' own model?

The memory is called PLE there. The model runs transformers' classes. In each PLE layer the forward is replaced, on
that instance alone, by the same operations in the same order with hook points between them, so that logits stay equal
bit for bit; the n-gram window and the convolution keep their cached states. Streams lie flattened as [B, T, M*D]
there and are [B, T, M, D] at every hook point. Raw token ids, splitmix64 multipliers (seed 1234), windows that reset
after each end of text, gains 1 + w, eps from the config.
Misleads: `ple_layer_ids` are 1-based, blocks here are 0-based; slots count rows of their own head, the table holds
them in one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MethodType

import torch
from tokenizers import Tokenizer
from torch import nn

from engram_interp.memory import CompressedVocabulary, Engram, EngramOptions, NgramHash
from engram_interp.memory.in_memory_rows import InMemoryRows
from engram_interp.memory.row_reader import RowReader
from engram_interp.models.adapters.assemble import RESIDENT_BYTES, StoredEmbedding, assemble_engram
from engram_interp.models.adapters.hosted import HostedModel, HostLayout, load_host
from engram_interp.models.adapters.qwen4_exp_memory import VARIANT, open_tables, regenerate, require_equal
from engram_interp.models.adapters.tensors import AdapterError, TensorFiles, fingerprint, read_json
from engram_interp.models.checkpoint import CONFIG, load_tokenizer
from engram_interp.models.protocol import ModelIdentity
from engram_interp.models.site import EngramSite, HashConstants, site_of_engram
from engram_interp.shapes import Int64, Tensor

MODEL_TYPES = ("qwen4_exp", "qwen4_exp_text")


def open_qwen4_exp(
    directory: Path, device_map: str | None = None, *, resident_bytes: int = RESIDENT_BYTES
) -> Qwen4ExpModel:
    """Open a checkpoint directory, its table in one tensor or in shards, with transformers' `Qwen4ExpForCausalLM` in
    float32.

    Args: device_map: as `load_host`; the table takes no part in it. resident_bytes: a table beyond this in float32 is not loaded:
        it stays in its files, mapped, and every forward reads the rows that it addresses.
    Raises: AdapterError for anything missing, extra, misshaped, damaged, or hash constants that the configuration
        contradicts.
    """
    if read_json(directory / CONFIG).get("model_type") not in MODEL_TYPES:
        raise AdapterError(f"{directory / CONFIG}: expected model_type {' or '.join(MODEL_TYPES)}")
    tokenizer = load_tokenizer(directory)
    tables = {
        block: table for block, table in open_tables(directory).items() if 4 * table.rows * table.width > resident_bytes
    }
    host = load_host(directory, _host_class(tables), device_map)
    identity = ModelIdentity(
        directory.resolve().name, fingerprint(TensorFiles(directory).files), directory.name, "qwen4_exp"
    )
    return Qwen4ExpModel.wrap(host, tokenizer, identity)


class Qwen4ExpModel(HostedModel):
    """Transformers' model with hook points around and inside its memories."""

    @classmethod
    def wrap(cls, host: nn.Module, tokenizer: Tokenizer, identity: ModelIdentity) -> Qwen4ExpModel:
        """Put hook points into a loaded `Qwen4ExpForCausalLM`; that instance is changed, its outputs are not.

        Raises: AdapterError when its stored hash constants are not those of its configuration.
        """
        config = host.config.get_text_config()  # type: ignore[operator, union-attr]
        layout = HostLayout.find(host, "model.layers", config.hc_count)
        if tokenizer.get_vocab_size() > config.vocab_size:
            raise AdapterError(
                f"config says {config.vocab_size} tokens, the tokenizer has {tokenizer.get_vocab_size()}"
            )
        sites = [
            _site_of(layer.ple, config, block) for block, layer in enumerate(layout.layers) if layer.ple is not None
        ]
        model = cls(host, layout, sites, tokenizer, identity)
        for site in model.sites:
            points = model.blocks[site.block]
            ple = layout.layers[site.block].ple
            _hook_table(ple.ple_embedding, site.engram)
            ple.forward = MethodType(_hooked_forward(site.engram, points.hook_engram_out), ple)
        return model

    @torch.no_grad()
    def generate(self, tokens: Int64[Tensor, "B T"], new: int, *, use_cache: bool = True) -> Int64[Tensor, "B T2"]:
        """Continue texts of equal length by `new` tokens, greedily, through transformers' own generation."""
        self._check_tokens(tokens)
        options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "use_cache": use_cache}
        mask = torch.ones_like(tokens)
        with self.lock:
            return self.host.generate(tokens, attention_mask=mask, **options)  # type: ignore[operator]


def _host_class(stored: Mapping[int, RowReader]) -> type:
    """Transformers' class, with the tables of some blocks left in their files: it neither makes nor loads them."""
    from transformers import Qwen4ExpForCausalLM

    class Host(Qwen4ExpForCausalLM):
        def __init__(self, config: object) -> None:
            super().__init__(config)
            for block, reader in stored.items():
                self.model.layers[block].ple.ple_embedding.ngram_embedding = StoredEmbedding(reader)

    tables = [rf"layers\.{block}\.ple\.ple_embedding\.ngram_embedding\." for block in stored]
    # By name and module transformers finds how checkpoints name their tensors.
    Host.__name__, Host.__module__ = Qwen4ExpForCausalLM.__name__, Qwen4ExpForCausalLM.__module__
    known = Qwen4ExpForCausalLM._keys_to_ignore_on_load_unexpected or []
    Host._keys_to_ignore_on_load_unexpected = [*known, *tables]
    return Host


def _hooked_forward(engram: Engram, hook_out: nn.Module):  # noqa: ANN202 - a method for one PLE layer
    """The forward of `Qwen4ExpTextPLELayer` with hook points: same operations, same order."""
    from transformers.models.qwen4_exp.modeling_qwen4_exp import apply_mask_to_padding_states

    def forward(self, hidden_states, input_ids, past_key_values, conv_mask=None):  # noqa: ANN001, ANN202
        streams = (self.hc_count, self.hidden_size)
        embeddings = engram.hook_embedding(self.ple_embedding(input_ids, past_key_values))
        key = engram.hook_key(self.key_proj(embeddings).unflatten(-1, streams)).flatten(-2)
        key_normed = self.norm_key(key).unflatten(-1, streams)
        value = engram.hook_value(self.value_proj(embeddings))
        query_normed = self.norm_query(hidden_states).unflatten(-1, streams)
        score = (key_normed * query_normed).sum(dim=-1, keepdim=True) / math.sqrt(self.hidden_size)
        score = engram.hook_score(score.squeeze(-1)).unsqueeze(-1)
        gate = torch.sigmoid(score.abs().clamp_min(1e-6).sqrt() * score.sign())
        gate = engram.hook_gate(gate.squeeze(-1)).unsqueeze(-1)
        gated_value = engram.hook_gated_value(gate * value.unsqueeze(-2)).flatten(-2)
        gated_value_normed = self.norm_conv(gated_value)
        if conv_mask is not None:
            gated_value = apply_mask_to_padding_states(gated_value, conv_mask)
            gated_value_normed = apply_mask_to_padding_states(gated_value_normed, conv_mask)
        conv_out = self._short_conv(gated_value_normed, past_key_values)
        conv_out = engram.hook_conv_out(conv_out.unflatten(-1, streams)).flatten(-2)
        return hook_out((gated_value + conv_out).unflatten(-1, streams)).flatten(-2)

    return forward


def _hook_table(embedding: nn.Module, engram: Engram) -> None:
    """Pass the slots through `hook_slots` on their way to the table; sums of integers, so nothing changes."""

    def enter(_: nn.Module, args: tuple[Int64[Tensor, "B T S"]]) -> tuple[Int64[Tensor, "B T S"]]:
        offsets = embedding.ngram_heads_offsets.to(args[0].device)
        return (engram.hook_slots(args[0] - offsets) + offsets,)

    embedding.ngram_embedding.register_forward_pre_hook(enter)


def _site_of(ple: nn.Module, config: object, block: int) -> EngramSite:
    embedding = ple.ple_embedding
    regenerated, stored = regenerate(config, embedding.ple_layer_index), _stored(embedding)
    require_equal(stored, regenerated, f"block {block}")
    engram = _engram_of(ple, config, stored)
    return site_of_engram(
        block,
        engram,
        VARIANT,
        streams=config.hc_count,  # type: ignore[attr-defined]
        regenerated=regenerated,
        stored=stored,
        rows=_rows(embedding.ngram_embedding, f"model.layers.{block}.ple.ple_embedding.ngram_embedding.weight"),
        numbered_rows=True,
    )


def _rows(table: nn.Module, name: str) -> RowReader:
    return table.reader if isinstance(table, StoredEmbedding) else InMemoryRows(table.weight, name)  # type: ignore[arg-type]


def _stored(embedding: nn.Module) -> HashConstants:
    sizes = embedding.ngram_heads_vocab_sizes.view(embedding.ngram_size - 1, embedding.heads_per_ngram)
    return HashConstants(
        tuple(embedding.layer_multipliers.tolist()),
        tuple(tuple(row) for row in sizes.tolist()),
        tuple(embedding.ngram_heads_offsets.tolist()),
        embedding.ngram_embedding.weight.shape[0],
    )


def _engram_of(ple: nn.Module, config: object, constants: HashConstants) -> Engram:
    """The same layer as an `Engram`: table and projections shared, gains 1 + w copied, hook points the model's."""
    streams = (ple.hc_count, ple.hidden_size)
    eps = config.rms_norm_eps  # type: ignore[attr-defined]
    eos = ple.ple_embedding.eos_token_id
    vocabulary = CompressedVocabulary.identity(config.vocab_size)  # type: ignore[attr-defined]
    ngram_hash = NgramHash(
        vocabulary, constants.multipliers or (), constants.primes or (), pad=eos, boundary="reset", eos=eos
    )
    embedding = ple.ple_embedding.ngram_embedding
    table = embedding.reader if isinstance(embedding, StoredEmbedding) else embedding.weight
    options = EngramOptions(
        width=ple.hidden_size,
        branches=ple.hc_count,
        head_width=embedding.weight.shape[1],
        conv_kernel=ple.conv1d.weight.shape[-1],
        conv_dilation=ple.conv1d.dilation[0],
        gate_eps=eps,
        conv_eps=eps,
    )
    weights = {
        "key_proj.weight": ple.key_proj.weight,
        "value_proj.weight": ple.value_proj.weight,
        "key_norm": 1.0 + ple.norm_key.weight.view(streams),
        "query_norm": 1.0 + ple.norm_query.weight.view(streams),
        "conv_norm": 1.0 + ple.norm_conv.weight.view(streams),
        "conv": ple.conv1d.weight.view(*streams, -1),
    }
    return assemble_engram(ngram_hash, options, weights, table, resident_bytes=0)
