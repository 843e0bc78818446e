"""What does the memory hold for this phrase, and what does one row say?

`lookup`: the n-grams a text addresses, their slots per order and head, and the norms of the rows there. `read_slot`: a
row through its own block of W_V and the unembedding, which tokens it promotes; the corpus n-grams that read it, if an
index is given. `neighbours`: the rows nearest to a row by cosine. Cost: the rows named; `neighbours` streams one head.
Misleads: the unembedding is read directly at the memory's layer, before any later layer acts; the other S - 1 rows of a
position add to the same value, and the gate may close on it. Rows of different heads meet different blocks of W_V and
W_K, so a cosine between them means nothing: neighbours are sought in the row's own head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float32

from engram_interp.memory.address import (
    SEPARATOR,
    SlotAddress,
    address_of_row,
    addresses_of_mix,
    compress,
    mixes,
    windows,
)
from engram_interp.memory.ngram_counts import NgramCounts, readers_of_slot
from engram_interp.memory.row_reader import RowIndexError, RowReader, chunks
from engram_interp.models.site import EngramSite
from engram_interp.models.text import show_tokens
from engram_interp.probes.memory_site import (
    AddressedModel,
    Section,
    hash_of,
    ngram_parts,
    rows_of,
    sections_of,
    site_of,
    token_ids,
)
from engram_interp.runs import Provenance, texts_hash
from engram_interp.shapes import Float, Tensor

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_CONTROL_ROWS = 1024


@dataclass(frozen=True)
class NgramReading:
    """One n-gram at one position: its row in each of the K heads and the norm of that row.

    `complete` is False where the window reaches before the text and holds the pad id.
    """

    block: int
    position: int
    token: str
    order: int
    ngram: tuple[str, ...]
    ids: tuple[int, ...]
    complete: bool
    addresses: tuple[SlotAddress, ...]
    norms: tuple[float, ...]


@dataclass(frozen=True)
class LookupResult:
    """What a text addresses, in one memory or in all."""

    model: str
    text: str
    tokens: tuple[str, ...]
    ngrams: tuple[NgramReading, ...]
    provenance: Provenance

    def table(self) -> pd.DataFrame:
        """One row per block, position, order and head."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "block": n.block,
                    "position": n.position,
                    "token": n.token,
                    "order": n.order,
                    "ngram": SEPARATOR.join(n.ngram),
                    "complete": n.complete,
                    "head": address.head,
                    "slot": address.slot,
                    "row": address.row,
                    "norm": norm,
                }
                for n in self.ngrams
                for address, norm in zip(n.addresses, n.norms, strict=True)
            ]
        )

    def figure(self) -> go.Figure:
        """Row norms: one line per block, order and head, one column per token."""
        from engram_interp.figures.memory import lookup_figure

        return lookup_figure(self.table(), self.tokens, title=self.model)

    def as_dict(self) -> dict[str, object]:
        """Plain data: `ngrams` with `slots`, `rows` and `norms` [K] each."""
        ngrams = [
            {
                "block": n.block,
                "position": n.position,
                "token": n.token,
                "order": n.order,
                "ngram": list(n.ngram),
                "ids": list(n.ids),
                "complete": n.complete,
                "slots": [address.slot for address in n.addresses],
                "rows": [address.row for address in n.addresses],
                "norms": list(n.norms),
            }
            for n in self.ngrams
        ]
        return {
            "model": self.model,
            "text": self.text,
            "tokens": list(self.tokens),
            "ngrams": ngrams,
            "provenance": self.provenance.as_dict(),
        }


def lookup(model: AddressedModel, text: str, *, block: int | None = None) -> LookupResult:
    """The rows a text addresses. Position 0 is the model's start token, if it has one.

    Args: block: one memory; None all of them.
    Raises: ValueError for an empty text, or a model or block without memory.
    """
    tokens = next(token_ids(model, [text]), None)
    if tokens is None:
        raise ValueError("expected a text with at least one token, found an empty text")
    shown = show_tokens(model.tokenizer, tokens.tolist())
    blocks = model.engram_layers if block is None else (block,)
    sites = [site_of(model, b) for b in blocks] or [site_of(model)]  # the latter raises: no memory
    readings = [reading for site in sites for reading in _look_up(model, site, tokens, shown)]
    provenance = _provenance(model, [text], {"blocks": [site.block for site in sites]})
    return LookupResult(model.identity.name, text, tuple(shown), tuple(readings), provenance)


def _look_up(model: AddressedModel, site: EngramSite, tokens: np.ndarray, shown: Sequence[str]) -> list[NgramReading]:
    ngram_hash = hash_of(site)
    compressed = compress(ngram_hash, tokens)
    mix, of_order = mixes(ngram_hash, compressed), windows(ngram_hash, compressed)
    found = []
    for t, token in enumerate(shown):
        for n, window in enumerate(of_order):
            addresses = addresses_of_mix(ngram_hash, site.block, window.order, int(mix[t, n]))
            rows = site.rows.read(np.array([address.row for address in addresses], dtype=np.int64))
            found.append(
                NgramReading(
                    block=site.block,
                    position=t,
                    token=token,
                    order=window.order,
                    ngram=tuple(ngram_parts(site, model, window.ids[t])),
                    ids=tuple(window.ids[t].tolist()),
                    complete=bool(window.complete[t]),
                    addresses=addresses,
                    norms=tuple(np.linalg.norm(rows, axis=1).tolist()),
                )
            )
    return found


@dataclass(frozen=True)
class TokenPromotion:
    """`logit` of a token minus the mean over the vocabulary; `excess` is what the mean row of the same head does not
    give.
    """

    token: str
    token_id: int
    logit: float
    excess: float


@dataclass(frozen=True)
class SlotReading:
    """One row through W_V and the unembedding; `ngrams` are the corpus n-grams that read it, with counts."""

    model: str
    address: SlotAddress
    norm: float
    value_norm: float
    promoted: tuple[TokenPromotion, ...]
    suppressed: tuple[TokenPromotion, ...]
    ngrams: tuple[tuple[str, int], ...]
    provenance: Provenance

    def table(self) -> pd.DataFrame:
        """One row per token, promoted first; read without the unembedding, one row with address and norms."""
        import pandas as pd

        if not self.promoted:
            return pd.DataFrame([{**asdict(self.address), "norm": self.norm, "value_norm": self.value_norm}])
        rows = [asdict(token) | {"direction": "promoted"} for token in self.promoted]
        return pd.DataFrame(rows + [asdict(token) | {"direction": "suppressed"} for token in self.suppressed])

    def figure(self) -> go.Figure:
        """Bars: logit of the promoted and suppressed tokens, with what the head's mean row gives."""
        from engram_interp.figures.memory import promotion_figure

        if not self.promoted:
            raise ValueError("expected a row read through the unembedding to draw, found one read without it")
        a = self.address
        return promotion_figure(
            self.table(), title=f"{self.model}, block {a.layer}, order {a.order}, head {a.head}, slot {a.slot}"
        )

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {**asdict(self), "provenance": self.provenance.as_dict()}


@torch.no_grad()
def read_slot(
    model: AddressedModel,
    row: int,
    *,
    block: int | None = None,
    top: int = 10,
    vocab: bool = True,
    index: NgramCounts | None = None,
    seed: int = 0,
) -> SlotReading:
    """Which tokens a row promotes: its block of W_V times the row, through the unembedding (biases left out).

    Args: row: of the flat table; index: n-grams of a corpus, to name those that read it;
    vocab: False leaves the unembedding out; seed: draws the control rows.
    Raises: ValueError for a row that no head owns, a model without memory, or one without an unembedding.
    """
    site = site_of(model, block)
    address = address_of_row(hash_of(site), site.block, row)
    vector = site.rows.read(np.array([row], dtype=np.int64))
    value = _values(site, address, vector)
    promoted, suppressed = _promotions(model, site, address, value, top, seed) if vocab else ((), ())
    options: dict[str, object] = {
        "block": site.block, "row": row, "top": top, "seed": seed, "control_rows": _CONTROL_ROWS,
    }  # fmt: skip
    return SlotReading(
        model=model.identity.name,
        address=address,
        norm=float(np.linalg.norm(vector)),
        value_norm=float(value.norm()),
        promoted=promoted,
        suppressed=suppressed,
        ngrams=_readers(model, site, address, index, top) if index else (),
        provenance=_provenance(model, [], options),
    )


def _readers(
    model: AddressedModel, site: EngramSite, address: SlotAddress, index: NgramCounts, top: int
) -> tuple[tuple[str, int], ...]:
    found = readers_of_slot(index, hash_of(site), address.order, address.head, address.slot)
    shown = range(min(top, len(found)))
    return tuple((SEPARATOR.join(ngram_parts(site, model, found.ids[i])), int(found.count[i])) for i in shown)


def _values(site: EngramSite, address: SlotAddress, rows: Float32[np.ndarray, "n head"]) -> Float[Tensor, "n D"]:
    section = site.orders.index(address.order) * site.heads + address.head
    block = site.value.weight[:, section * site.head_width : (section + 1) * site.head_width]
    return torch.from_numpy(rows).to(block) @ block.T


def _control_rows(site: EngramSite, section: Section, seed: int) -> Float32[np.ndarray, "n head"]:
    count = min(_CONTROL_ROWS, section.stop - section.start)
    chosen = np.random.default_rng(seed).choice(section.stop - section.start, count, replace=False)
    return site.rows.read(section.start + np.sort(chosen))


def _centred_logits(model: AddressedModel, values: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
    with model.lock:  # type: ignore[attr-defined]
        logits = model.unembed(values).float()  # type: ignore[attr-defined] - memories alone refuse if they have none
    return logits - logits.mean(-1, keepdim=True)


def _promotions(
    model: AddressedModel, site: EngramSite, address: SlotAddress, value: Float[Tensor, "1 D"], top: int, seed: int
) -> tuple[tuple[TokenPromotion, ...], tuple[TokenPromotion, ...]]:
    """The `top` promoted and the `top` suppressed tokens."""
    if model.tokenizer is None:
        raise ValueError(f"model {model.identity.name!r} was opened without a tokenizer; its tokens have no names")
    section = next(s for s in sections_of(site) if s.start <= address.row < s.stop)
    mean_value = _values(site, address, _control_rows(site, section, seed)).mean(0, keepdim=True)
    logits, control = _centred_logits(model, torch.cat([value, mean_value]))
    ids = torch.argsort(logits, descending=True).tolist()
    chosen = ids[:top] + ids[::-1][:top]
    shown = dict(zip(chosen, show_tokens(model.tokenizer, chosen), strict=True))
    of = lambda i: TokenPromotion(shown[i], i, float(logits[i]), float(logits[i] - control[i]))  # noqa: E731
    return tuple(map(of, ids[:top])), tuple(map(of, ids[::-1][:top]))


@dataclass(frozen=True)
class NeighbourResult:
    """The rows nearest to `row` by cosine among `searched` rows, nearest first."""

    table_name: str
    row: int
    searched: int
    rows: tuple[int, ...]
    cosines: tuple[float, ...]
    provenance: Provenance

    def table(self) -> pd.DataFrame:
        """One row per neighbour."""
        import pandas as pd

        return pd.DataFrame({"row": self.rows, "cosine": self.cosines})

    def figure(self) -> go.Figure:
        """Cosine against rank."""
        from engram_interp.figures.memory import neighbour_figure

        return neighbour_figure(self.table(), title=f"{self.table_name}, row {self.row}")

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {**asdict(self), "provenance": self.provenance.as_dict()}


def neighbours(source: EngramSite | RowReader, row: int, *, top: int = 10, progress: bool = False) -> NeighbourResult:
    """The rows most like a row, among those of its head (of a bare table: among all).

    Args: source: a memory (`site_of(model, block)`) or a reader.
    Raises: RowIndexError for a row outside the table; ValueError for a row of norm zero.
    """
    reader = rows_of(source)
    section = next((s for s in sections_of(source) if s.start <= row < s.stop), None)
    if section is None:
        raise RowIndexError(f"{reader.name}: expected a row in [0, {sections_of(source)[-1].stop}), found {row}")
    query = reader.read(np.array([row], dtype=np.int64))[0]
    if not 0 < float(np.linalg.norm(query)) < np.inf:
        raise ValueError(f"{reader.name}: row {row} has norm {float(np.linalg.norm(query))}, no direction to compare")
    best_rows, best = np.array([], dtype=np.int64), np.array([], dtype=np.float32)
    for start, block in chunks(reader, section.start, section.stop, progress=progress):
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine = (block @ query) / (np.linalg.norm(block, axis=1) * np.linalg.norm(query))
        cosine[~np.isfinite(cosine)] = -2  # a zero row has no direction
        if start <= row < start + len(block):
            cosine[row - start] = -2  # not its own neighbour
        best_rows = np.concatenate([best_rows, np.arange(start, start + len(block))])
        best = np.concatenate([best, cosine])
        keep = np.argsort(-best, kind="stable")[:top]
        best_rows, best = best_rows[keep], best[keep]
    real = best > -2
    options = {"row": row, "top": top, "rows": [section.start, section.stop]}
    return NeighbourResult(
        reader.name,
        row,
        section.stop - section.start,
        tuple(best_rows[real].tolist()),
        tuple(best[real].tolist()),
        Provenance({reader.name: ""}, texts_hash([]), 0, options),
    )


def _provenance(model: AddressedModel, texts: Sequence[str], options: dict[str, object]) -> Provenance:
    return Provenance({model.identity.name: model.identity.weights_sha256}, texts_hash(texts), len(texts), options)
