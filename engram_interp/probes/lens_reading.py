"""How are the residuals of texts read into numbers per site and token?

Windows of a text go through the model one at a time; the vectors they leave at every site are collected until a few
hundred tokens share one pass over the vocabulary. Which arithmetic the pass takes, and why, is recorded:

    quantities "all"                  all logits of a chunk, float32 (`engram_interp.kernels.lens`)
    quantities "kl", precision exact  the identity on float32 tiles (`engram_interp.kernels.lens_kl`)
    quantities "kl", precision fast   the identity on bfloat16 products, whichever kind this machine multiplies fastest

A head that is not a plain matrix (bias, soft cap) has its logits formed in every case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch

from engram_interp.kernels.lens import LensError, LensReadings, lens_readings
from engram_interp.kernels.lens_kl import lens_kl, plain_head, sampled_error
from engram_interp.models.protocol import Decoder
from engram_interp.models.text import Window, windows
from engram_interp.shapes import Float, Int64, Tensor

Precision = Literal["exact", "fast"]
Quantities = Literal["all", "kl"]

_BATCH = 256  # tokens collected before the unembeddings, so that short texts share them
_IDENTITY_BATCH = 2048  # by the identity, whose check of a sample costs the same whatever the batch
_BATCH_BYTES = 32 * 2**20  # of the collected vectors, above which _BATCH tokens are enough


@runtime_checkable
class Lens(Protocol):
    """What turns a site's residual into one the exit path can read; the plain logit lens leaves it alone."""

    @property
    def name(self) -> str:
        """Printed with every result."""
        ...

    def check(self, model: Decoder) -> None:
        """Raise ValueError when the lens was not made for this model."""
        ...

    def translate(self, site: int, hidden: Float[Tensor, "B T M D"]) -> Float[Tensor, "B T M D"]:
        """The residual in the final basis."""
        ...


def cut_text(model: Decoder, text: str, number: int) -> list[Window]:
    """The windows of one text.

    Raises: LensError naming the text.
    """
    try:
        return list(windows(model, text))
    except ValueError as error:
        raise LensError(f"text {number}: {error}") from None


def kept_ids(cut: Sequence[Window], start: int) -> Int64[np.ndarray, " T"]:
    """The text's own token ids, each once, without the start token."""
    return torch.cat([w.tokens[0, max(w.keep.start, start) : w.keep.stop] for w in cut]).numpy()


@dataclass(frozen=True)
class Piece:
    """Exit-ready vectors of the tokens one window adds."""

    sites: Tensor  # [L, n, D]
    final: Tensor  # [n, D]
    targets: Tensor  # [n]


def read_pieces(
    model: Decoder, cuts: list[list[Window]], ids: list[np.ndarray], start: int, lens: Lens | None, stream: int | None
) -> Iterator[Piece]:
    """One forward per window of every text.

    Raises: LensError for a residual that is not finite (layer, position and text named) or a stream the model has not.
    """
    for number, (cut, text_ids) in enumerate(zip(cuts, ids, strict=True)):
        targets = torch.from_numpy(np.append(text_ids[1:], -1))
        done = 0
        for window in cut:
            keep = slice(max(window.keep.start, start), window.keep.stop)
            sites, final = _exit_vectors(model, window.tokens, keep, lens, stream, number)
            yield Piece(sites, final, targets[done : done + len(final)])
            done += len(final)


@torch.no_grad()
def _exit_vectors(
    model: Decoder, tokens: Tensor, keep: slice, lens: Lens | None, stream: int | None, text: int
) -> tuple[Tensor, Tensor]:
    with model.lock:
        residuals = [site[:, keep] for site in model.residuals(tokens)]
    _require_finite(residuals, text, keep.start)
    final = model.exit_hidden(residuals[-1])[0]
    vectors = []
    for site, hidden in enumerate(residuals):
        streams = hidden.shape[2]
        if stream is not None:
            if not 0 <= stream < streams:
                raise LensError(f"expected a stream in [0, {streams}), found {stream}")
            hidden = hidden[:, :, stream : stream + 1].expand(-1, -1, streams, -1)
        if lens is not None and site < len(residuals) - 1:
            hidden = lens.translate(site, hidden)
        vectors.append(final if site == len(residuals) - 1 and stream is None else model.exit_hidden(hidden)[0])
    return torch.stack(vectors), final


def _require_finite(residuals: list[Tensor], text: int, offset: int) -> None:
    for site, hidden in enumerate(residuals):
        finite = torch.isfinite(hidden).all(-1).all(-1)[0]
        if not bool(finite.all()):
            position = offset + int(torch.nonzero(~finite)[0])
            where = "the embedding output" if site == 0 else f"the output of block {site - 1}"
            raise LensError(f"{where} (layer {site}) is not finite at position {position} of text {text}")


@dataclass
class Arithmetic:
    """How readings are formed: by the identity where `head` is a plain matrix, else from all logits of a chunk."""

    model: Decoder
    unigram: Tensor
    quantities: Quantities
    precision: Precision
    head: Tensor | None
    description: str = "all logits of a chunk, float32"
    reason: str = "every quantity"
    error: float | None = None  # largest deviation of KL from float64 on sampled tokens, nats

    @classmethod
    def of(cls, model: Decoder, unigram: np.ndarray, quantities: Quantities, precision: Precision) -> Arithmetic:
        """The arithmetic for a model.

        Raises: ValueError for a name that is not known, or "fast" where more than KL is asked for.
        """
        for name, value, known in (
            ("quantities", quantities, get_args(Quantities)),
            ("precision", precision, get_args(Precision)),
        ):
            if value not in known:
                raise ValueError(f"expected {name} {' or '.join(known)}, found {value!r}")
        if precision == "fast" and quantities == "all":
            raise ValueError("expected quantities='kl' with precision='fast': bfloat16 products give KL alone")
        head = plain_head(model, model.unembed)
        reason = "every quantity" if quantities == "all" else "the unembedding is not a plain matrix"
        return cls(model, torch.from_numpy(np.asarray(unigram)).float(), quantities, precision, head, reason=reason)

    def batch(self, piece: Piece) -> int:
        """Tokens to collect before a call, so that short texts share the passes over the vocabulary."""
        if self.quantities == "all" or self.head is None:
            return _BATCH
        token = piece.sites[:, :1].numel() * piece.sites.element_size()
        return min(max(_BATCH_BYTES // token, _BATCH), _IDENTITY_BATCH)

    def __call__(self, sites: Tensor, final: Tensor, targets: Tensor) -> LensReadings:
        """Readings of the collected tokens."""
        if self.quantities == "all" or self.head is None:
            found = lens_readings(sites, final, self.model.unembed, targets, unigram=self.unigram)
            if self.head is not None and self.error is None:  # the first batch speaks for all of them
                self.error = sampled_error(found.kl, sites, final, self.head)
            return found
        exact = self.precision == "exact"
        found = lens_kl(sites, final, self.head, targets, path="auto" if exact else "fast", top1=exact)
        self.description, self.reason = found.choice.description, found.choice.reason
        self.error = max(found.error, self.error or 0.0)
        missing = torch.full_like(found.kl, torch.nan)
        cross_entropy, top1 = found.cross_entropy, found.top1
        return LensReadings(found.kl, missing, missing, missing, cross_entropy, top1, found.final_top1, missing[0])

    def record(self) -> dict[str, object]:
        """For the provenance: what was asked for, what was taken and why, and the error found on the way."""
        return {
            "quantities": self.quantities, "precision": self.precision, "arithmetic": self.description,
            "arithmetic_reason": self.reason, "kl_error": self.error,
        }  # fmt: skip


def form_readings(arithmetic: Arithmetic, pieces: Iterator[Piece]) -> dict[str, np.ndarray]:
    """Readings of all pieces, several at a time, by the field names of `LensReadings`."""
    results: list[LensReadings] = []
    pending: list[Piece] = []

    def flush() -> None:
        sites, final = torch.cat([p.sites for p in pending], 1), torch.cat([p.final for p in pending])
        targets = torch.cat([p.targets for p in pending])
        pending.clear()
        results.append(arithmetic(sites, final, targets))

    for piece in pieces:
        pending.append(piece)
        if sum(len(p.final) for p in pending) >= arithmetic.batch(piece):
            flush()
    if pending:
        flush()
    return {f.name: torch.cat([getattr(r, f.name) for r in results], -1).numpy() for f in fields(LensReadings)}
