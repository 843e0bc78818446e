"""What do the gates and the lens say at every token of some documents?

One forward per batch of windows gives the gates and every residual site; the sites of about a thousand tokens then share their
passes over the vocabulary (`engram_interp.kernels.lens_kl`). Start tokens are not read. What comes out for a list of documents
depends on that list, the model, the batch size and the number of threads alone, to the last bit: which process reads it, and
what it read before, does not enter. Cost: one forward and L + 2 unembeddings, times context / (context - 64) for windows that
overlap; memory: the residuals of one batch, those of a thousand tokens after the exit norm, and 4 bytes per token and quantity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from transformer_lens.hook_points import HookPoint

from engram_interp.corpus.sums import Quantity, Sums
from engram_interp.kernels.lens import lens_readings
from engram_interp.kernels.lens_kl import lens_kl, plain_head
from engram_interp.models.protocol import Decoder
from engram_interp.models.text import Window, start_tokens, windows_of_ids
from engram_interp.shapes import Tensor

if TYPE_CHECKING:
    import pandas as pd

Probe = Literal["gates", "lens"]
Numbered = tuple[int, Int64[np.ndarray, " _"]]  # a document's number and its tokens
_TOGETHER = 1024  # tokens that share a pass over the vocabulary


@dataclass(frozen=True, eq=False)
class Readings:
    """Every token of some documents, in order; float32. `documents`: number and length of each."""

    quantities: tuple[Quantity, ...]
    values: Float[np.ndarray, "Q N"]
    documents: tuple[tuple[int, int], ...]
    token_ids: Int64[np.ndarray, " N"]

    def sums(self) -> Sums:
        """Of all tokens."""
        return Sums.of(self.quantities, self.values)

    def by_document(self) -> pd.DataFrame:
        """One row per document: its number, its tokens, and the mean of every quantity (NaN without a token)."""
        import pandas as pd

        rows, end = [], 0
        for number, length in self.documents:
            part = self.values[:, end : end + length].astype(np.float64)
            counts = (~np.isnan(part)).sum(1)
            means = np.where(counts > 0, np.nansum(part, 1) / np.maximum(counts, 1), np.nan)
            rows.append({"document": number, "tokens": length} | self._named(means))
            end += length
        return pd.DataFrame(rows, columns=["document", "tokens", *self._named(self.quantities)])

    def by_token(self) -> pd.DataFrame:
        """One row per token: document, position in it, id, every quantity."""
        import pandas as pd

        lengths = [length for _, length in self.documents]
        places = {
            "document": np.repeat([number for number, _ in self.documents], lengths),
            "position": np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
            "token_id": self.token_ids.astype(np.int32),
        }
        return pd.DataFrame(places | self._named(self.values))

    def _named(self, values: Sequence | np.ndarray) -> dict:
        return {quantity.column: value for quantity, value in zip(self.quantities, values, strict=True)}


class CorpusReader:
    """Reads documents of any length with one model."""

    def __init__(self, model: Decoder, probes: Sequence[Probe], batch: int, device: torch.device) -> None:
        """Args: batch: windows per forward.

        Raises: ValueError for no probe, an unknown one, or gates of a model without memory.
        """
        if not probes or not set(probes) <= {"gates", "lens"}:
            raise ValueError(f"expected some of gates, lens to read, found {', '.join(probes) or 'none'}")
        self.model, self.batch, self.device = model, batch, device
        self.blocks: tuple[int, ...] = tuple(getattr(model, "engram_layers", ())) if "gates" in probes else ()
        if "gates" in probes and not self.blocks:
            raise ValueError(f"model {model.identity.name!r} has no memory to look at: read the lens alone")
        self.lens = "lens" in probes
        self.head = plain_head(model, model.unembed) if self.lens else None
        self.start = start_tokens(model)

    @torch.no_grad()
    def read(self, documents: Sequence[Numbered]) -> Readings:
        """Raises: LensError (a ValueError) or ValueError for a value that is not finite."""
        gates: list[Tensor] = []
        pending: list[_Piece] = []
        lens: list[Tensor] = []
        for number, ids in documents:
            targets = torch.from_numpy(np.append(ids[1:], -1)) if len(ids) else torch.empty(0, dtype=torch.int64)
            done = 0
            for piece in self._pieces(ids, number):
                gates.append(piece.gates)
                piece.targets = targets[done : done + piece.tokens]
                done += piece.tokens
                pending.append(piece)
                if sum(p.tokens for p in pending) >= _TOGETHER:
                    lens.append(self._predictions(pending))
                    pending = []
        if pending:
            lens.append(self._predictions(pending))
        return self._joined(documents, gates, lens)

    def _joined(self, documents: Sequence[Numbered], gates: list[Tensor], lens: list[Tensor]) -> Readings:
        gate = torch.cat(gates).permute(1, 2, 0) if gates else torch.empty(len(self.blocks), 0, 0)
        quantities = [Quantity("gate", block, m) for block in self.blocks for m in range(gate.shape[1])]
        values = gate.flatten(0, 1)
        if self.lens:
            sites = range(self.model.layers + 1)
            quantities += [Quantity(kind, site) for kind in ("kl", "cross_entropy", "agreement") for site in sites]
            values = torch.cat([values, torch.cat(lens, -1).flatten(0, 1)]) if lens else values
        if not lens and not gates:
            values = torch.empty(len(quantities), 0)
        lengths = tuple((number, len(ids)) for number, ids in documents)
        ids = np.concatenate([ids for _, ids in documents])
        return Readings(tuple(quantities), values.numpy(), lengths, ids)

    def _pieces(self, ids: np.ndarray, number: int) -> Iterator[_Piece]:
        windows = windows_of_ids(ids.tolist(), self.start, self.model.context)
        for _, same in groupby(windows, key=lambda window: window.tokens.shape[1]):
            group: list[Window] = []
            for window in same:
                group.append(window)
                if len(group) == self.batch:
                    yield from self._forward(group, number)
                    group = []
            if group:
                yield from self._forward(group, number)

    def _forward(self, group: list[Window], number: int) -> Iterator[_Piece]:
        """What each window adds; one forward for all."""
        tokens = torch.cat([window.tokens for window in group]).to(self.device)
        found: dict[int, Tensor] = {}

        def keep(block: int):  # noqa: ANN202
            def save(value: Tensor, hook: HookPoint) -> None:
                found[block] = value.detach().float().cpu()

            return save

        with self.model.hooks([(f"blocks.{block}.engram.hook_gate", keep(block)) for block in self.blocks]):
            residuals = self.model.residuals(tokens)
        gates = torch.empty(len(tokens), tokens.shape[1], 0, 0)
        if self.blocks:
            gates = torch.stack([found[block] for block in self.blocks], 2)
        if not bool(gates.isfinite().all()):
            raise ValueError(f"document {number}: a gate is not finite")
        exits = torch.stack([self.model.exit_hidden(site) for site in residuals], 1) if self.lens else None
        for row, window in enumerate(group):
            part = slice(max(window.keep.start, len(self.start)), window.keep.stop)
            yield _Piece(gates[row, part], None if exits is None else exits[row, :, part].clone())

    def _predictions(self, pieces: list[_Piece]) -> Tensor:
        """KL, cross-entropy and agreement with the final top-1: [3, L, n]."""
        if not self.lens:
            return torch.empty(0, 0, sum(p.tokens for p in pieces))
        sites = torch.cat([p.exits for p in pieces if p.exits is not None], 1)
        targets = torch.cat([p.targets for p in pieces if p.targets is not None]).to(self.device)
        if self.head is not None:
            read = lens_kl(sites, sites[-1], self.head, targets, top1=True)
        else:
            read = lens_readings(sites, sites[-1], self.model.unembed, targets)
        agreement = (read.top1 == read.final_top1).to(read.kl.dtype)
        return torch.stack([read.kl, read.cross_entropy, agreement]).float().cpu()


@dataclass(eq=False)
class _Piece:
    """What one window adds: gates [n, E, M], vectors that passed the exit norm [L, n, D], true next tokens [n]."""

    gates: Tensor
    exits: Tensor | None
    targets: Tensor | None = None

    @property
    def tokens(self) -> int:
        return len(self.gates)
