"""What does the memory read and write at one token, and who else reads the same rows?

For one position and one memory: the n-gram of every order, its row in every head with the norm of that row, and the
other n-grams of a reference corpus that read the row; then how the write Y = u + c divides into the gated value u and
the convolution c, and from which tokens the convolution draws (t, t - d, t - 2d, ...). Cost: one window's forward and,
with a corpus, one pass over its n-grams per row. Misleads: sharing a row is not interference unless both n-grams train
it; |u| and |c| need not add up to |Y|.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int64

from engram_interp.memory.address import SEPARATOR, SlotAddress, addresses_of_mix, compress, mixes
from engram_interp.memory.address import windows as ngram_windows
from engram_interp.memory.ngram_counts import NgramCounts, readers_of_slot
from engram_interp.models.protocol import MemoryModel
from engram_interp.models.text import start_tokens, windows
from engram_interp.probes.memory_site import hash_of, ngram_parts, site_of
from engram_interp.runs import Provenance, texts_hash

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class RowRead:
    """One row read: its address, the n-gram that addressed it, its norm, and other corpus n-grams there with counts."""

    address: SlotAddress
    ngram: str
    norm: float
    others: tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class TokenMemory:
    """The memory of `block` at `position`. Norms in residual units, over all branches together.

    `sources` are the positions the convolution draws from, the token itself first; `corpus_tokens` is 0 without a
    corpus.
    """

    model: str
    block: int
    position: int
    rows: tuple[RowRead, ...]
    gated_norm: float
    conv_norm: float
    write_norm: float
    hidden_norm: float
    sources: tuple[int, ...]
    corpus_tokens: int
    provenance: Provenance

    @property
    def shared(self) -> int:
        """How many of the rows another n-gram of the corpus reads as well."""
        return sum(bool(row.others) for row in self.rows)

    def table(self) -> pd.DataFrame:
        """One row per order and head."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "order": row.address.order,
                    "head": row.address.head,
                    "n-gram": row.ngram,
                    "slot": row.address.slot,
                    "row": row.address.row,
                    "norm": row.norm,
                    "other n-grams": len(row.others),
                }
                for row in self.rows
            ]
        )

    def sharing(self) -> pd.DataFrame:
        """One row per other n-gram in one of the slots, the most frequent first."""
        import pandas as pd

        records = [
            {
                "order": r.address.order,
                "head": r.address.head,
                "slot": r.address.slot,
                "other n-gram": text,
                "count": count,
            }
            for r in self.rows
            for text, count in r.others
        ]
        frame = pd.DataFrame(records, columns=["order", "head", "slot", "other n-gram", "count"])
        return frame.sort_values("count", ascending=False, kind="stable", ignore_index=True)

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        rows = [
            {**r.address.as_dict(), "ngram": r.ngram, "norm": r.norm, "others": [list(o) for o in r.others]}
            for r in self.rows
        ]
        norms = {name: getattr(self, name) for name in ("gated_norm", "conv_norm", "write_norm", "hidden_norm")}
        return {
            "model": self.model, "block": self.block, "position": self.position, "rows": rows, **norms,
            "sources": list(self.sources), "corpus_tokens": self.corpus_tokens, "provenance": self.provenance.as_dict(),
        }  # fmt: skip


def token_memory(
    model: MemoryModel,
    text: str,
    position: int,
    *,
    block: int | None = None,
    corpus: NgramCounts | None = None,
    norms: WriteNorms | None = None,
    most: int = 20,
) -> TokenMemory:
    """Look at one token of a text; positions count as in `read_gates`, the start token included.

    Args: block: None is the first memory; corpus: n-grams counted under this memory's hash; norms: of this text and block,
        where they are known already (`write_norms`); most: other n-grams kept per row.
    Raises: ValueError for a position outside the text, an empty text, or a model or block without memory.
    """
    site = site_of(model, block)
    ngram_hash = hash_of(site)
    ids = _ids(model, text)
    if not 0 <= position < len(ids):
        raise ValueError(f"expected a position in [0, {len(ids)}), found {position}")
    compressed = compress(ngram_hash, ids)
    mix, of_order = mixes(ngram_hash, compressed)[position], ngram_windows(ngram_hash, compressed)
    rows = []
    for n, window in enumerate(of_order):
        addresses = addresses_of_mix(ngram_hash, site.block, window.order, int(mix[n]))
        lengths = np.linalg.norm(site.rows.read(np.array([a.row for a in addresses], dtype=np.int64)), axis=1)
        text_of = SEPARATOR.join(ngram_parts(site, model, window.ids[position]))
        for address, length in zip(addresses, lengths, strict=True):
            others = _others(model, site, corpus, address, window.ids[position], most) if corpus else ()
            rows.append(RowRead(address, text_of, float(length), others))
    dilation, taps = (site.conv.dilation, site.conv.taps.shape[-1]) if site.conv else (1, 1)
    return TokenMemory(
        model=model.identity.name,
        block=site.block,
        position=position,
        rows=tuple(rows),
        **(norms or write_norms(model, text, site.block)).at(position),
        sources=tuple(s for s in range(position, position - taps * dilation, -dilation) if s >= 0),
        corpus_tokens=corpus.tokens if corpus else 0,
        provenance=Provenance(
            {model.identity.name: model.identity.weights_sha256},
            texts_hash([text]),
            1,
            {"block": site.block, "position": position, "corpus_tokens": corpus.tokens if corpus else 0},
        ),
    )


def ngram_labels(
    model: MemoryModel, ids: Int64[np.ndarray, " T"], *, block: int | None = None, first: int = 0
) -> list[tuple[str, ...]]:
    """The n-gram of every order that each token from `first` on addresses, shortest order first."""
    site = site_of(model, block)
    of_order = ngram_windows(hash_of(site), compress(hash_of(site), ids))
    return [
        tuple(SEPARATOR.join(ngram_parts(site, model, window.ids[t])) for window in of_order)
        for t in range(first, len(ids))
    ]


def slot_numbers(
    model: MemoryModel, ids: Int64[np.ndarray, " T"], *, block: int | None = None
) -> Int64[np.ndarray, "T S"]:
    """The slot of every token in every head, order-major."""
    site = site_of(model, block)
    ngram_hash = hash_of(site)
    mix = mixes(ngram_hash, compress(ngram_hash, ids))
    parts = [mix[:, n, None] % np.array(primes, dtype=np.int64) for n, primes in enumerate(site.primes)]
    return np.concatenate(parts, axis=1)


def _ids(model: MemoryModel, text: str) -> Int64[np.ndarray, " T"]:
    encoded = model.tokenizer.encode(text, add_special_tokens=False).ids
    if not encoded:
        raise ValueError("expected a text with at least one token, found an empty text")
    return np.array([*start_tokens(model), *encoded], dtype=np.int64)


def _others(model: MemoryModel, site, corpus: NgramCounts, address: SlotAddress, own: np.ndarray, most: int):  # noqa: ANN001, ANN202
    found = readers_of_slot(corpus, hash_of(site), address.order, address.head, address.slot)
    rows: Sequence[int] = [i for i in range(len(found)) if not np.array_equal(found.ids[i], own)][:most]
    return tuple((SEPARATOR.join(ngram_parts(site, model, found.ids[i])), int(found.count[i])) for i in rows)


@dataclass(frozen=True, eq=False)
class WriteNorms:
    """Norms of u, c, Y and h of one memory at every token of a text, over all branches together, in residual units."""

    gated: Float[np.ndarray, " T"]
    conv: Float[np.ndarray, " T"]
    write: Float[np.ndarray, " T"]
    hidden: Float[np.ndarray, " T"]

    def at(self, position: int) -> dict[str, float]:
        """The four norms at one position, named as in `TokenMemory`."""
        return {f"{name}_norm": float(values[position]) for name, values in vars(self).items()}


def write_norms(model: MemoryModel, text: str, block: int, *, limit: int = 8192) -> WriteNorms:
    """Read a text once; a memory without convolution has a `conv` of zeros.

    Raises: ValueError for an empty or too long text.
    """
    names = {
        "gated": f"blocks.{block}.engram.hook_gated_value",
        "conv": f"blocks.{block}.engram.hook_conv_out",
        "write": f"blocks.{block}.hook_engram_out",
        "hidden": f"blocks.{block}.hook_resid_pre",
    }
    there = [name for name in names.values() if name in model.hook_dict]
    parts: dict[str, list[np.ndarray]] = {key: [] for key in names}
    for window in windows(model, text, limit=limit):
        _, cache = model.run_with_cache(window.tokens, there)
        for key, name in names.items():
            # a memory without convolution never calls its hook, so what was recorded decides
            values = cache[name][0].float().flatten(1).norm(dim=1) if name in cache else window.tokens[0].float() * 0
            parts[key].append(values[window.keep].numpy())
    return WriteNorms(**{key: np.concatenate(values).astype(np.float64) for key, values in parts.items()})
