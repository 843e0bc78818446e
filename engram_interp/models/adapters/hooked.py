"""What do adapters share? A memory with the house's hook names, lock and recording, with or without a model.

Raw checkpoints too large to run (DeepSeek-V4.1) and the published demo's bare modules still answer everything that
needs token ids and given hidden states: addresses, rows, keys, values, and, with captured hidden states, gates and
writes.
Misleads: hidden states must come from the model itself; gates for made-up states say nothing about it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from tokenizers import Tokenizer
from torch import nn
from transformer_lens import ActivationCache
from transformer_lens.hook_points import HookPoint

from engram_interp.memory import CompressedVocabulary, Engram
from engram_interp.models.hooked_root import LockedHooks
from engram_interp.models.lock import ModelLock
from engram_interp.models.protocol import ModelIdentity, NamesFilter
from engram_interp.models.site import EngramSite
from engram_interp.models.text import show_tokens
from engram_interp.shapes import Float, Int64, Tensor


class HookedBlock(nn.Module):
    """The hook points of one block, and its memory if it has one."""

    def __init__(self, engram: Engram | None) -> None:
        super().__init__()
        self.hook_resid_pre = HookPoint()
        self.has_engram = engram is not None
        if engram is not None:
            self.engram = engram
            self.hook_engram_out = HookPoint()
        self.hook_resid_post = HookPoint()


class HookedMemory(LockedHooks):
    """Hook points, lock and recording of an adapter; `sites` in ascending order of block."""

    def __init__(self, sites: Sequence[EngramSite], tokenizer: Tokenizer | None, identity: ModelIdentity) -> None:
        super().__init__()
        self.sites = tuple(sorted(sites, key=lambda site: site.block))
        self.tokenizer = tokenizer
        self.identity = identity
        self.lock = ModelLock()

    @property
    def engram_layers(self) -> tuple[int, ...]:
        """0-based blocks that hold a memory, ascending."""
        return tuple(site.block for site in self.sites)

    @property
    def vocabulary(self) -> CompressedVocabulary:
        """The compressed vocabulary of the first memory."""
        return self.sites[0].vocabulary

    def engram(self, block: int) -> Engram:
        """The memory of a block.

        Raises: ValueError when the block has none.
        """
        for site in self.sites:
            if site.block == block:
                return site.engram
        raise ValueError(f"block {block} has no memory; memories are in blocks {list(self.engram_layers)}")

    def to_tokens(self, text: str) -> Int64[Tensor, "1 T"]:
        """The ids of a text with the special tokens the tokenizer itself puts around it.

        Raises: ValueError for an empty text, or a memory that was opened without a tokenizer.
        """
        ids = self._require_tokenizer().encode(text, add_special_tokens=True).ids
        if not ids:
            raise ValueError("expected a text with at least one token, found an empty text")
        return torch.tensor([ids])

    def to_str_tokens(self, tokens: Int64[Tensor, " T"]) -> list[str]:
        """Each token by itself; byte fragments in hexadecimal."""
        return show_tokens(self._require_tokenizer(), tokens.tolist())

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("this memory was opened without a tokenizer; put its tokenizer.json beside it")
        return self.tokenizer


class StandaloneMemory(HookedMemory):
    """The memories of a model whose other layers are not here; `head` opens its unembedding when it is asked for."""

    def __init__(
        self,
        sites: Sequence[EngramSite],
        tokenizer: Tokenizer | None,
        identity: ModelIdentity,
        head: Callable[[], Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        super().__init__(sites, tokenizer, identity)
        self._open_head = head
        self.blocks = nn.ModuleDict({str(site.block): HookedBlock(site.engram) for site in self.sites})
        self.setup()

    @torch.no_grad()
    def forward(
        self, tokens: Int64[Tensor, "B T"], hidden: Mapping[int, Float[Tensor, "B T M D"]]
    ) -> dict[int, Float[Tensor, "B T M D"]]:
        """The streams after each given block's memory: h + Y.

        Args: hidden: by block, the streams before its memory.
        Raises: ValueError for a block without a memory or a shape that does not fit it.
        """
        with self.lock:
            return {block: self._after(block, tokens, streams) for block, streams in hidden.items()}

    def run_with_cache(  # type: ignore[override]
        self,
        tokens: Int64[Tensor, "B T"],
        hidden: Mapping[int, Float[Tensor, "B T M D"]],
        names_filter: NamesFilter = None,
        *,
        clone: bool = True,
    ) -> tuple[dict[int, Tensor], ActivationCache]:
        """The streams after each given block's memory, and the recorded activations.

        Raises: KeyError for a filter that matches no hook point.
        """
        out, records = self._recorded((tokens, hidden), names_filter, clone)
        return out, ActivationCache(records, self)  # type: ignore[return-value]

    def unembed(self, hidden: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        """Logits of vectors taken as ready for the head, whose rows are read from the checkpoint.

        Raises: ValueError for memories without their model's unembedding.
        """
        if self._open_head is None:
            name = self.identity.name
            raise ValueError(f"model {name!r} was opened without its unembedding; its values cannot be read as tokens")
        return self._open_head()(hidden)

    def _after(
        self, block: int, tokens: Int64[Tensor, "B T"], hidden: Float[Tensor, "B T M D"]
    ) -> Float[Tensor, "B T M D"]:
        engram = self.engram(block)
        expected = (*tokens.shape, engram.options.branches, engram.options.width)
        if tuple(hidden.shape) != expected:
            raise ValueError(f"block {block}: expected hidden states of shape {expected}, found {tuple(hidden.shape)}")
        points = self.blocks[str(block)]
        hidden = points.hook_resid_pre(hidden)
        return points.hook_resid_post(hidden + points.hook_engram_out(engram(hidden, tokens)))
