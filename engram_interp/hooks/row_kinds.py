"""Is it the content of the rows, and which rows?

These kinds change what is read from the table: nothing at all, other rows of the same table, some orders, heads or
slots, coarser rows, or fewer of them. The checkpoint is never changed: rows are altered on their way out of the table,
which is exact because a row's rounding or removal depends on that row alone. Acts before the branches part, so it has
no `branches`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from transformer_lens.hook_points import HookPoint

from engram_interp.hooks.site import AblationError, Hook, Kind, Site, capture, check_choice
from engram_interp.hooks.statistics import MemoryStatistics
from engram_interp.shapes import Bool, Float, Tensor

Replacement = Literal["zero", "mean"]
PruneRule = Literal["norm", "use", "random"]
_MASK63 = 2**63 - 1


def embedding_zero(site: Site) -> list[Hook]:
    """e = 0; with biases the write is not zero then."""
    return [(site.inside("embedding"), lambda old, hook: site.put(old, old.new_zeros(()), branched=False))]


def hash_permute(site: Site, *, seed: int = 0, inverse: bool = False) -> list[Hook]:
    """Every head reads through a bijection of its rows: slot -> a slot + b modulo its prime, a and b drawn by `seed`.

    `inverse` undoes the permutation of the same seed: nested, the two change nothing.
    """
    sizes = site.memory.ngram_hash.sizes  # type: ignore[attr-defined]
    rng = np.random.default_rng((seed, site.block))
    factor = [int(rng.integers(1, size)) for size in sizes]
    shift = [int(rng.integers(0, size)) for size in sizes]
    if inverse:
        back = [pow(a, -1, size) for a, size in zip(factor, sizes, strict=True)]
        shift = [(-b * a) % size for a, b, size in zip(back, shift, sizes, strict=True)]
        factor = back
    a, b, p = (torch.tensor(v, dtype=torch.int64) for v in (factor, shift, sizes))

    def permute(slots: Tensor, hook: HookPoint) -> Tensor:
        on = slots.device
        return site.put(slots, (slots * a.to(on) + b.to(on)) % p.to(on), branched=False)

    return [(site.inside("slots"), permute)]


def hash_reseed(site: Site, *, seed: int = 0) -> list[Hook]:
    """Every n-gram reads other rows, drawn anew by `seed`, with collisions of its own.

    The K slots of an order name its n-gram (their primes are coprime), so a hash of them is a hash of the n-gram under
    another seed.
    """
    ngram_hash = site.memory.ngram_hash  # type: ignore[attr-defined]
    k, p = ngram_hash.heads, torch.tensor(ngram_hash.sizes, dtype=torch.int64)
    draws = np.random.default_rng((seed, site.block, 1)).integers(0, 2**62, size=(len(p), k + 1), dtype=np.int64)
    factors = torch.from_numpy(draws * 2 + 1)

    def reseed(slots: Tensor, hook: HookPoint) -> Tensor:
        on = slots.device
        of_order = slots.unflatten(-1, (-1, k)).repeat_interleave(k, dim=-2)
        key = ((of_order + 1) * factors[:, :k].to(on)).sum(-1)
        key = (key ^ ((key & _MASK63) >> 31)) * factors[:, k].to(on)
        return site.put(slots, ((key ^ ((key & _MASK63) >> 29)) & _MASK63) % p.to(on), branched=False)

    return [(site.inside("slots"), reseed)]


def one_row(site: Site, *, row: int = 0) -> list[Hook]:
    """Every position reads the same row of each head: a table of capacity one."""
    check_choice("row", [row], range(min(site.memory.ngram_hash.sizes)))  # type: ignore[attr-defined]
    return [(site.inside("slots"), lambda old, hook: site.put(old, old.new_full((), row), branched=False))]


def mean_row(site: Site, *, statistics: MemoryStatistics) -> list[Hook]:
    """Every position reads the mean of what was read on the fitted texts."""
    mean = statistics.blocks[site.block].embedding_mean
    return [(site.inside("embedding"), lambda old, hook: site.put(old, mean.to(old.device), branched=False))]


def keep_order(
    site: Site, *, order: int, replace: Replacement = "mean", statistics: MemoryStatistics | None = None
) -> list[Hook]:
    """Only the rows of one n-gram order stay; those of other orders become their mean, or zero."""
    ngram_hash = site.memory.ngram_hash  # type: ignore[attr-defined]
    check_choice("order", [order], ngram_hash.orders)
    k = ngram_hash.heads
    lost = [s for s in range(len(ngram_hash.sizes)) if s // k != order - 2]
    return _drop_slots(site, lost, replace, statistics)


def heads(
    site: Site,
    *,
    heads: Sequence[int],
    orders: Sequence[int] | None = None,
    replace: Replacement = "zero",
    statistics: MemoryStatistics | None = None,
) -> list[Hook]:
    """The rows of these hash heads, of all orders or the given ones, become zero or their mean."""
    ngram_hash = site.memory.ngram_hash  # type: ignore[attr-defined]
    chosen = check_choice("heads", heads, range(ngram_hash.heads))
    of = check_choice("orders", ngram_hash.orders if orders is None else orders, ngram_hash.orders)
    lost = [(order - 2) * ngram_hash.heads + head for order in of for head in chosen]
    return _drop_slots(site, lost, replace, statistics)


def slots(
    site: Site,
    *,
    slots: Sequence[int],
    replace: Replacement = "zero",
    statistics: MemoryStatistics | None = None,
) -> list[Hook]:
    """The rows of these slots (order-major, 0 to S-1) become zero or their mean."""
    chosen = check_choice("slots", slots, range(len(site.memory.ngram_hash.sizes)))  # type: ignore[attr-defined]
    return _drop_slots(site, chosen, replace, statistics)


def _drop_slots(
    site: Site, lost: Sequence[int], replace: Replacement, statistics: MemoryStatistics | None
) -> list[Hook]:
    if replace not in ("zero", "mean"):
        raise AblationError(f"expected replace to be 'zero' or 'mean', found {replace!r}")
    if replace == "mean" and statistics is None:
        raise AblationError("replace='mean' needs statistics=collect_memory_statistics(model, texts), found none")
    count = len(site.memory.ngram_hash.sizes)  # type: ignore[attr-defined]
    gone = torch.zeros(count, dtype=torch.bool)
    gone[list(lost)] = True

    def drop(old: Tensor, hook: HookPoint) -> Tensor:
        stand_in = old.new_zeros(old.shape[-1])
        if replace == "mean" and statistics is not None:
            stand_in = statistics.blocks[site.block].embedding_mean.to(old)
        columns = gone.to(old.device).repeat_interleave(old.shape[-1] // count)
        return site.put(old, torch.where(columns, stand_in, old), branched=False)

    return [(site.inside("embedding"), drop)]


def quantise_rows(rows: Float[Tensor, "*any head"], bits: int, block: int | None = None) -> Float[Tensor, "*any head"]:
    """Round rows to 2^bits - 1 symmetric levels, one scale (largest magnitude) per row or per `block` columns."""
    top = 2 ** (bits - 1) - 1
    groups = rows.unflatten(-1, (-1, block or rows.shape[-1]))
    scale = groups.abs().amax(-1, keepdim=True) / top
    levels = torch.where(scale > 0, groups / scale.where(scale > 0, 1.0), 0.0).round()
    return (levels * scale).flatten(-2)


def quantise(site: Site, *, bits: int, per: Literal["row", "block"] = "row", block: int = 32) -> list[Hook]:
    """Rows rounded to 8, 4, 3 or 2 bits: symmetric levels, one scale per row, or per `block` columns of it."""
    if bits not in (8, 4, 3, 2) or per not in ("row", "block"):
        raise AblationError(f"expected bits 8, 4, 3 or 2 and per 'row' or 'block', found {bits} and {per!r}")
    count = len(site.memory.ngram_hash.sizes)  # type: ignore[attr-defined]

    def round_rows(old: Tensor, hook: HookPoint) -> Tensor:
        rows = old.unflatten(-1, (count, -1))
        if per == "block" and rows.shape[-1] % block:
            raise AblationError(f"expected a block that divides the row width {rows.shape[-1]}, found {block}")
        new = quantise_rows(rows, bits, block if per == "block" else None)
        return site.put(old, new.flatten(-2), branched=False)

    return [(site.inside("embedding"), round_rows)]


def rows_kept(
    site: Site, fraction: float, by: PruneRule, seed: int, statistics: MemoryStatistics | None
) -> Bool[Tensor, " rows"]:
    """Which rows survive when `fraction` of a table is pruned: smallest norm first, least used first, or at random.

    Ties (rows never read) are broken at random, so that no head loses more than its share by its place in the table.
    """
    if not 0 <= fraction <= 1:
        raise AblationError(f"expected a fraction in [0, 1], found {fraction}")
    count = site.memory.ngram_hash.rows  # type: ignore[attr-defined]
    shuffled = torch.from_numpy(np.random.default_rng((seed, site.block)).permutation(count))
    if by == "norm":
        score = site.memory.table.weight.detach().float().norm(dim=1).cpu()[shuffled]  # type: ignore[attr-defined]
        shuffled = shuffled[score.argsort(stable=True)]
    elif by == "use":
        use = statistics.blocks[site.block].use if statistics else None
        if use is None:
            raise AblationError("pruning by use needs statistics=collect_memory_statistics(model, texts), found none")
        shuffled = shuffled[use[shuffled].argsort(stable=True)]
    elif by != "random":
        raise AblationError(f"expected by to be 'norm', 'use' or 'random', found {by!r}")
    kept = torch.ones(count, dtype=torch.bool)
    kept[shuffled[: round(fraction * count)]] = False
    return kept


def prune_rows(
    site: Site, *, fraction: float, by: PruneRule = "norm", seed: int = 0, statistics: MemoryStatistics | None = None
) -> list[Hook]:
    """A fraction of the table's rows reads as zero."""
    kept, seen = rows_kept(site, fraction, by, seed, statistics), {}

    def prune(old: Tensor, hook: HookPoint) -> Tensor:
        rows = site.memory.ngram_hash.rows_of_slots(seen.pop("slots"))  # type: ignore[attr-defined]
        alive = kept.to(old.device)[rows].repeat_interleave(old.shape[-1] // rows.shape[-1], dim=-1)
        return site.put(old, old.where(alive, 0.0), branched=False)

    return [(site.inside("slots"), capture(seen, "slots")), (site.inside("embedding"), prune)]


KINDS = (
    Kind("embedding_zero", embedding_zero, "off", "as output_zero, with what the biases write kept", branched=False),
    Kind("hash_permute", hash_permute, "marginal on", "content of the rows, apart from their presence", branched=False),
    Kind("hash_reseed", hash_reseed, "marginal on", "content of the rows, with other collisions", branched=False),
    Kind(
        "one_row",
        one_row,
        "partly on",
        "is it memory, or the extra parameters of a read that never changes",
        branched=False,
    ),
    Kind("mean_row", mean_row, "mean on", "what the rows say beyond their average", ("statistics",), branched=False),
    Kind("keep_order", keep_order, "partly on", "which n-gram order carries it", branched=False),
    Kind("heads", heads, "off (zero) or partly on (mean)", "how redundant the hash heads are", branched=False),
    Kind("slots", slots, "off (zero) or partly on (mean)", "which slot carries it", branched=False),
    Kind("quantise", quantise, "nearly on", "how many bits a row needs", branched=False),
    Kind("prune_rows", prune_rows, "nearly on (few rows) to off", "how many rows can go, and which", branched=False),
)
