"""Which n-grams share a row?

Distinct corpus n-grams are counted under a memory's own hash. Per head: how many are not alone in their slot, and the
load of the slots, each beside what a uniform hash would give. Per order: how many share the rows of all K heads with
another (then the memory cannot tell them apart). Per token of the first texts: how many corpus n-grams share its rows,
per head and in all. Cost: one sort of the corpus per order, one pass per head; `index` reads counts from disk instead
of memory. Misleads: collisions grow with the corpus, so compare corpora of one size; sharing a row is not interference
unless both n-grams train it, and rare n-grams hardly do. Counts are of n-grams, not of reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int64

from engram_interp.memory.access import expected_colliding, load_histogram, slot_loads
from engram_interp.memory.address import SEPARATOR, compress, mixes, windows
from engram_interp.memory.ngram_counts import NgramCounts, count_ngrams, key_modulus, keys, present, sharers
from engram_interp.models.site import EngramSite
from engram_interp.models.text import show_tokens
from engram_interp.probes.memory_site import AddressedModel, hash_of, ngram_parts, site_of, token_ids
from engram_interp.runs import Provenance, texts_hash

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class HeadCollisions:
    """One head: `ngrams` distinct n-grams in `slots` slots; `colliding` of them share their slot.

    `load[k]` slots hold k n-grams; `expected_*` are those of a uniform hash.
    """

    order: int
    head: int
    slots: int
    ngrams: int
    occupied: int
    colliding: int
    expected_colliding: float
    largest_load: int
    load: Int64[np.ndarray, " loads"]
    expected_load: Float[np.ndarray, " loads"]


@dataclass(frozen=True)
class OrderCollisions:
    """One order: `colliding` of `ngrams` distinct n-grams share the rows of all its heads with another one."""

    order: int
    ngrams: int
    colliding: int
    expected_colliding: float
    largest_group: int


@dataclass(frozen=True)
class TokenSharing:
    """One n-gram in a text: other corpus n-grams that share its row in all heads, and in the mean, least, most shared
    head.
    """

    text: int
    position: int
    token: str
    order: int
    ngram: str
    shared_all: int
    shared_mean: float
    shared_least: int
    shared_most: int


@dataclass(frozen=True, eq=False)
class CollisionResult:
    """Collisions of one memory over one corpus of `tokens` tokens."""

    model: str
    block: int
    tokens: int
    heads: tuple[HeadCollisions, ...]
    orders: tuple[OrderCollisions, ...]
    sharing: tuple[TokenSharing, ...]
    provenance: Provenance

    def table(self) -> pd.DataFrame:
        """One row per head, and one per order with head "all"."""
        import pandas as pd

        columns = ("order", "head", "slots", "ngrams", "occupied", "colliding", "expected_colliding", "largest_load")
        rows = [{name: getattr(head, name) for name in columns} for head in self.heads]
        rows += [{**asdict(order), "head": "all", "largest_load": order.largest_group} for order in self.orders]
        frame = pd.DataFrame(rows, columns=columns)
        frame.insert(6, "share", frame["colliding"] / frame["ngrams"])
        return frame

    def load_table(self) -> pd.DataFrame:
        """One row per head and load: slots observed and expected."""
        import pandas as pd

        parts = [
            pd.DataFrame(
                {
                    "order": h.order,
                    "head": h.head,
                    "load": np.arange(len(h.load)),
                    "observed": h.load,
                    "expected": h.expected_load,
                }
            )
            for h in self.heads
        ]
        return pd.concat(parts, ignore_index=True)

    def figure(self) -> go.Figure:
        """Share of colliding n-grams per head, observed beside expected."""
        from engram_interp.figures.memory import collision_figure

        return collision_figure(self.table(), title=f"{self.model}, block {self.block}")

    def load_figure(self) -> go.Figure:
        """Slots by load, observed beside expected, mean over the heads of an order."""
        from engram_interp.figures.memory import load_figure

        return load_figure(self.load_table(), title=f"{self.model}, block {self.block}")

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        heads = [asdict(h) | {"load": h.load.tolist(), "expected_load": h.expected_load.tolist()} for h in self.heads]
        return {
            "model": self.model,
            "block": self.block,
            "tokens": self.tokens,
            "heads": heads,
            "orders": [asdict(order) for order in self.orders],
            "sharing": [asdict(row) for row in self.sharing],
            "provenance": self.provenance.as_dict(),
        }


def slot_collisions(
    model: AddressedModel,
    texts: Sequence[str],
    *,
    block: int | None = None,
    index: NgramCounts | None = None,
    inspect: int = 8,
    progress: bool = False,
) -> CollisionResult:
    """Collisions among the distinct n-grams of a corpus in one memory.

    Args: block: None is the first memory; index: an `NgramIndex` of a corpus, used instead of counting `texts`;
    inspect: for how many texts, from the first, every n-gram is looked at.
    Raises: ValueError for a model without memory, or a corpus without a token.

    >>> import engram_interp
    >>> from engram_interp.gallery import load_gallery
    >>> from engram_interp.probes import slot_collisions
    >>> found = slot_collisions(engram_interp.load("mini-engram"), [s.text for s in load_gallery()[:20]])
    >>> all(head.occupied <= min(head.ngrams, head.slots) for head in found.heads)
    True
    """
    from tqdm import tqdm

    site = site_of(model, block)
    ngram_hash = hash_of(site)
    counts = index or count_ngrams(ngram_hash, token_ids(model, texts, progress=progress))
    inspected = [_inspect(model, site, tokens) for tokens in token_ids(model, texts[:inspect])]
    heads = []
    sections = [(order, head) for order in site.orders for head in range(site.heads)]
    for order, head in tqdm(sections, desc="heads", disable=not progress):
        load = slot_loads(counts, ngram_hash, order, head)
        heads.append(_head(order, head, load))
        for text in inspected:  # one head's load is in memory at a time: a table has 16 million slots per head
            text.loads[order].append(load[text.mix[order] % len(load)])
    options = {"block": site.block, "inspect": inspect, "index": index is not None, "tokens": counts.tokens}
    weights = {model.identity.name: model.identity.weights_sha256}
    return CollisionResult(
        model=model.identity.name,
        block=site.block,
        tokens=counts.tokens,
        heads=tuple(heads),
        orders=tuple(_order(site, counts, order) for order in site.orders),
        sharing=tuple(row for i, text in enumerate(inspected) for row in _sharing(site, counts, i, text)),
        provenance=Provenance(weights, texts_hash(texts), len(texts), options),
    )


def _head(order: int, head: int, load: Int64[np.ndarray, " slots"]) -> HeadCollisions:
    ngrams, histogram = int(load.sum()), load_histogram(load)
    return HeadCollisions(
        order=order,
        head=head,
        slots=len(load),
        ngrams=ngrams,
        occupied=int((load > 0).sum()),
        colliding=int(load[load > 1].sum()),
        expected_colliding=expected_colliding(ngrams, len(load)),
        largest_load=int(load.max()),
        load=histogram.observed,
        expected_load=histogram.expected,
    )


def _order(site: EngramSite, counts: NgramCounts, order: int) -> OrderCollisions:
    primes = site.primes[site.orders.index(order)]
    ngrams = colliding = largest = 0
    for part in counts.parts(order):
        sizes = np.unique(keys(part.mix, primes), return_counts=True)[1]
        ngrams += len(part)
        colliding += int(sizes[sizes > 1].sum())
        largest = max(largest, int(sizes.max(initial=0)))
    modulus = key_modulus(primes) or 2**63
    return OrderCollisions(order, ngrams, colliding, expected_colliding(ngrams, modulus), largest)


@dataclass(frozen=True, eq=False)
class _Inspected:
    """One text whose n-grams are looked at: by order, mix and text of every n-gram, load of its slot per head."""

    tokens: list[str]
    mix: dict[int, Int64[np.ndarray, " T"]]
    ngrams: dict[int, list[str]]
    loads: dict[int, list[np.ndarray]]


def _inspect(model: AddressedModel, site: EngramSite, tokens: Int64[np.ndarray, " T"]) -> _Inspected:
    ngram_hash = hash_of(site)
    compressed = compress(ngram_hash, tokens)
    mix = mixes(ngram_hash, compressed)
    of_order = windows(ngram_hash, compressed)
    return _Inspected(
        tokens=show_tokens(model.tokenizer, tokens.tolist()),
        mix={window.order: mix[:, n] for n, window in enumerate(of_order)},
        ngrams={w.order: [SEPARATOR.join(ngram_parts(site, model, ids)) for ids in w.ids] for w in of_order},
        loads={window.order: [] for window in of_order},
    )


def _sharing(site: EngramSite, counts: NgramCounts, number: int, text: _Inspected) -> list[TokenSharing]:
    found = []
    for order, primes in zip(site.orders, site.primes, strict=True):
        in_all = sharers(counts, order, primes, text.mix[order])
        itself = present(counts, order, text.mix[order])  # not always: an index may be of another corpus
        per_head = np.stack(text.loads[order], axis=1) - itself[:, None]
        found += [
            TokenSharing(
                text=number,
                position=t,
                token=token,
                order=order,
                ngram=text.ngrams[order][t],
                shared_all=int(in_all[t]),
                shared_mean=float(per_head[t].mean()),
                shared_least=int(per_head[t].min()),
                shared_most=int(per_head[t].max()),
            )
            for t, token in enumerate(text.tokens)
        ]
    return found
