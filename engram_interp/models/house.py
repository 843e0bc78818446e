"""The house transformer: Engram or mixture of experts by configuration.

A pre-norm decoder on TransformerLens hook points with M residual streams. Block i:

    H <- H + Engram_i(H, ids)           only where the configuration puts a memory; before attention, as published
    H <- R H + post Attention(norm(read(H)))
    H <- R' H + post' Experts(norm(read(H)))

and one exit path `logits = unembed(norm(mean over streams))`, which the model and every lens share.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import cast

import torch
from tokenizers import Tokenizer
from torch import nn
from transformer_lens.hook_points import HookPoint

from engram_interp.memory import (
    CompressedVocabulary,
    Engram,
    EngramOptions,
    EngramState,
    NgramHash,
    assign_primes,
    pcg64_multipliers,
)
from engram_interp.models.block import Block, BlockState, DecodeState, RMSNorm
from engram_interp.models.cache import EngramCache
from engram_interp.models.config import ModelConfig
from engram_interp.models.hooked_root import LockedHooks
from engram_interp.models.lock import ModelLock
from engram_interp.models.protocol import ModelIdentity, NamesFilter
from engram_interp.models.text import show_tokens
from engram_interp.shapes import Float, Int64, Tensor


class HouseModel(LockedHooks):
    """The house transformer.

    `model(tokens)` gives logits [B, T, V]. `model.lock` is held by every forward and by whatever attaches hooks, so
    that two threads never see each other's hooks. Texts are right-padded with `config.pad_id`; padding anywhere else is
    refused, because pads enter n-gram windows and the convolution.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: CompressedVocabulary,
        tokenizer: Tokenizer | None = None,
        identity: ModelIdentity | None = None,
    ) -> None:
        super().__init__()
        # Without this a forward compiled before a hook is attached ignores the hook silently.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        self.cfg = config
        self.vocabulary = vocabulary
        self.tokenizer = cast("Tokenizer", tokenizer)  # None only where no text is read, as in training
        self.identity = identity or ModelIdentity(config.name, "", "not saved", "house")
        self.lock = ModelLock()
        memories = _build_memories(config, vocabulary)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.hook_embed = HookPoint()
        self.blocks = nn.ModuleList(Block(config, i, memories.get(i)) for i in range(config.layers))
        self.ln_final = RMSNorm(config.width, config.norm_eps)
        if not config.tied:
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.setup()

    # -- structure ---------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return self.cfg.layers

    @property
    def width(self) -> int:
        """D."""
        return self.cfg.width

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.cfg.vocab_size

    @property
    def context(self) -> int:
        """Longest text in tokens, `<bos>` included."""
        return self.cfg.context

    @property
    def engram_layers(self) -> tuple[int, ...]:
        """0-based blocks that hold a memory, ascending."""
        return tuple(sorted(self.cfg.engram.blocks)) if self.cfg.engram else ()

    def engram(self, block: int) -> Engram:
        """The memory of a block.

        Raises: ValueError when the block has none.
        """
        if block not in self.engram_layers:
            raise ValueError(f"block {block} has no memory; memories are in blocks {list(self.engram_layers)}")
        return self.blocks[block].engram  # type: ignore[return-value]

    @property
    def W_U(self) -> Float[Tensor, "D V"]:  # noqa: N802 - TransformerLens name
        """The unembedding; the embedding itself where they are tied."""
        return self.unembedding.T

    @property
    def unembedding(self) -> Float[Tensor, "V D"]:
        """The weight of the head, a row a token."""
        return self.embed.weight if self.cfg.tied else self.head.weight

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(self, tokens: Int64[Tensor, "B T"], state: DecodeState | None = None) -> Float[Tensor, "B T V"]:
        """Logits of the next token at every position.

        Args: tokens: raw ids, right-padded; state: continue a text (updated in place).
        Raises: ValueError for an empty or too long text, an id outside the vocabulary, or padding before a token.
        """
        with nullcontext() if torch.compiler.is_compiling() else self.lock:
            return self.logits(self.streams(tokens, state)[0])

    def streams(
        self, tokens: Int64[Tensor, "B T"], state: DecodeState | None = None
    ) -> tuple[Float[Tensor, "B T M D"], Float[Tensor, ""]]:
        """The streams after the last block, and the mean load-balance loss over blocks."""
        if not torch.compiler.is_compiling():
            self._check_tokens(tokens, state)
        embedded = self.hook_embed(self.embed(tokens))
        hidden = embedded.unsqueeze(2).expand(-1, -1, self.cfg.streams, -1)
        losses = []
        for i, block in enumerate(self.blocks):
            hidden, balance = block(hidden, tokens, state.blocks[i] if state else None)
            losses.append(balance)
        return hidden, torch.stack(losses).mean()

    def reduce_streams(self, hidden: Float[Tensor, "B T M D"]) -> Float[Tensor, "B T D"]:
        """The model's own read-out of its streams: their mean."""
        return hidden.mean(2)

    def logits(self, hidden: Float[Tensor, "B T M D"]) -> Float[Tensor, "B T V"]:
        """The one exit path: mean over streams, final norm, unembedding."""
        return self.unembed(self.exit_hidden(hidden))

    def exit_hidden(self, hidden: Float[Tensor, "B T M D"]) -> Float[Tensor, "B T D"]:
        """What the unembedding reads: the mean over streams after the final norm."""
        return self.ln_final(self.reduce_streams(hidden))

    def unembed(self, hidden: Float[Tensor, "*any D"]) -> Float[Tensor, "*any V"]:
        """Logits of vectors that passed the final norm."""
        return nn.functional.linear(hidden, self.unembedding)

    @torch.no_grad()
    def residuals(self, tokens: Int64[Tensor, "B T"]) -> list[Float[Tensor, "B T M D"]]:
        """The streams before block 0 and after every block, from one forward that stops before the exit."""
        records: list[Tensor] = []
        sites = [f"blocks.{i}.hook_resid_post" for i in range(self.layers)]

        def save(value: Tensor, hook: HookPoint) -> None:
            records.append(value)

        with self.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", save), *((site, save) for site in sites)]):
            self.streams(tokens)
        return records

    @torch.no_grad()
    def resume(
        self, tokens: Int64[Tensor, "B T"], hidden: Float[Tensor, "B T M D"], block: int
    ) -> Float[Tensor, "B T M D"]:
        """The streams after the last block, given those before `block`."""
        with self.lock:
            for later in self.blocks[block:]:
                hidden, _ = later(hidden, tokens)
        return hidden

    # -- text --------------------------------------------------------------------------------------------------------

    def to_tokens(self, text: str) -> Int64[Tensor, "1 T"]:
        """`<bos>` and the ids of a text.

        Raises: ValueError for an empty text, or one longer than the context.
        """
        ids = self._require_tokenizer().encode(text, add_special_tokens=False).ids
        if not ids:
            raise ValueError("expected a text with at least one token, found an empty text")
        if len(ids) + 1 > self.context:
            raise ValueError(f"expected at most {self.context - 1} tokens of text, found {len(ids)}")
        return torch.tensor([[self.cfg.bos_id, *ids]])

    def to_str_tokens(self, tokens: Int64[Tensor, " T"]) -> list[str]:
        """Each token by itself; byte fragments in hexadecimal."""
        return show_tokens(self._require_tokenizer(), tokens.tolist())

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("this model was built without a tokenizer; load a checkpoint or pass one")
        return self.tokenizer

    def _check_tokens(self, tokens: Int64[Tensor, "B T"], state: DecodeState | None) -> None:
        seen, length = (state.seen if state else 0), tokens.shape[1]
        if tokens.numel() == 0:
            raise ValueError("expected at least one token, found an empty text")
        if seen + length > self.cfg.context:
            raise ValueError(f"expected at most {self.cfg.context} tokens, found {seen + length}")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.cfg.vocab_size:
            raise ValueError(f"expected token ids in [0, {self.cfg.vocab_size}), found {low if low < 0 else high}")
        pads = tokens == self.cfg.pad_id
        if state and bool(pads.any()):
            raise ValueError(f"expected no padding (id {self.cfg.pad_id}) while decoding: later tokens would read it")
        if bool((pads[:, :-1] & ~pads[:, 1:]).any()) or bool(pads[:, 0].any()):
            raise ValueError(
                f"expected padding (id {self.cfg.pad_id}) only after the text; found it before a token. "
                "Left padding changes the n-grams and the convolution: pad on the right"
            )

    # -- decoding ----------------------------------------------------------------------------------------------------

    def start_decoding(self, batch: int) -> DecodeState:
        """An empty state for `batch` texts."""
        memories = {i: EngramState.start(self.engram(i), batch) for i in self.engram_layers}
        return DecodeState([BlockState(engram=memories.get(i)) for i in range(self.layers)])

    @torch.no_grad()
    def generate(
        self,
        tokens: Int64[Tensor, "B T"],
        new: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Int64[Tensor, "B T2"]:
        """Continue texts of equal length by `new` tokens, greedily or sampled with a passed generator; never by
        padding.
        """
        if temperature > 0 and generator is None:
            raise ValueError("expected a torch.Generator to sample with, found None")
        state, step = self.start_decoding(len(tokens)), tokens
        for _ in range(new):
            last = self(step, state)[:, -1].clone()
            last[:, self.cfg.pad_id] = -torch.inf
            if temperature > 0:
                step = torch.multinomial((last / temperature).softmax(-1), 1, generator=generator)
            else:
                step = last.argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, step], dim=1)
        return tokens

    # -- hooks -------------------------------------------------------------------------------------------------------

    def run_with_cache(  # type: ignore[override]
        self, tokens: Int64[Tensor, "B T"], names_filter: NamesFilter = None, *, clone: bool = True
    ) -> tuple[Float[Tensor, "B T V"], EngramCache]:
        """Logits and the recorded activations.

        Args: names_filter: a hook name, a shell pattern (`blocks.*.hook_resid_post`), several of either, or a
            predicate; None records everything. clone: copy each record, so that a later in-place write cannot change
            it.
        Raises: KeyError with near matches when a name matches no hook point.
        """
        logits, records = self._recorded((tokens,), names_filter, clone)
        return logits, EngramCache(records, self)  # type: ignore[return-value]


def hashed_vocabulary(config: ModelConfig, tokenizer: Tokenizer) -> CompressedVocabulary:
    """The token map that a configuration's memories hash with."""
    if config.engram is not None and not config.engram.compressed:
        return CompressedVocabulary.identity(config.vocab_size)
    return CompressedVocabulary.from_tokenizer(tokenizer)


def _build_memories(config: ModelConfig, vocabulary: CompressedVocabulary) -> dict[int, Engram]:
    """The Engram layers by block; primes and multipliers as in the released demo."""
    engram = config.engram
    if engram is None:
        return {}
    if vocabulary.size != engram.compressed_vocab_size:
        raise ValueError(
            f"expected a tokenizer that compresses to {engram.compressed_vocab_size} ids, found {vocabulary.size}; "
            "every hash multiplier depends on it"
        )
    primes = assign_primes(engram.rows_per_head, engram.heads, len(engram.blocks))
    options = EngramOptions(
        width=config.width,
        branches=config.streams if engram.fusion == "branches" else 1,
        head_width=engram.head_width,
        gate=engram.gate,
        biases=engram.biases,
        conv_kernel=engram.conv_kernel,
    )
    memories = {}
    for block, block_primes in zip(engram.blocks, primes, strict=True):
        multipliers = pcg64_multipliers(engram.seed, block, vocabulary.size, engram.max_order)
        pad = int(vocabulary.token_map[config.pad_id])
        memories[block] = Engram(NgramHash(vocabulary, multipliers, block_primes, pad), options)
    return memories


@torch.no_grad()
def initialise(model: HouseModel, generator: torch.Generator, *, table_std: float = 0.02) -> HouseModel:
    """Draw starting weights: matrices N(0, 1/sqrt(fan_in)), outputs shrunk by sqrt(2 layers), embeddings N(0, .02).

    Norm gains start at 1 and conv taps at 0 (paper section 4.1); the table's deviation is not published.
    """
    shrink = (2 * model.cfg.layers) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name.endswith(("_norm", ".conv")):
            continue
        if name in ("embed.weight", "head.weight"):
            std = 0.02
        elif name.endswith("table.weight"):
            std = table_std
        else:
            fan_in = parameter.shape[-2] if parameter.ndim == 3 else parameter.shape[-1]
            std = fan_in**-0.5 * (shrink if name.endswith(("out.weight", "w_out", "w_out.weight")) else 1.0)
        parameter.normal_(0, std, generator=generator)
    return model
