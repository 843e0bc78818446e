"""Hash and gather on CUDA in one launch: token ids in, memory vectors out, no address in between.

One program reads BLOCK_T positions of one slot: mix by XOR of products, mix mod prime by Barrett's reduction (quotient =
high word of mix * floor(2^64 / prime), at most one too small since mix < 2^63; a 64-bit division costs a subroutine), and
then the row. Reference: `engram_interp.memory.hashing.NgramHash`. Import this module only where Triton is installed.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from engram_interp.memory.hashing import NgramHash
from engram_interp.shapes import Float, Int64, Tensor

BLOCK_T = 16
WARPS = 4


@triton.jit
@no_type_check
def ngram_gather(compressed, multipliers, primes, magics, offsets, table, out, texts, length, pad,
                 SLOTS: tl.constexpr, HEADS: tl.constexpr, ORDERS: tl.constexpr, WIDTH: tl.constexpr,
                 BLOCK_W: tl.constexpr, BLOCK_T: tl.constexpr):  # fmt: skip
    """out[text, t, slot] = table[row of slot]; `compressed` is [texts, length], `out` [texts, length, SLOTS, WIDTH]."""
    slot = tl.program_id(1)
    position = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = position < texts * length
    t = position % length
    at = position.to(tl.int64)
    order = slot // HEADS + 2
    mix = tl.zeros((BLOCK_T,), dtype=tl.int64)
    for lag in tl.static_range(ORDERS + 1):
        token = tl.load(compressed + at - lag, mask=live & (t >= lag), other=0)
        token = tl.where(t >= lag, token, pad)
        term = token * tl.load(multipliers + lag)
        mix = tl.where(lag < order, mix ^ term, mix)
    prime = tl.load(primes + slot)
    magic = tl.load(magics + slot).to(tl.uint64, bitcast=True)
    quotient = tl.umulhi(mix.to(tl.uint64, bitcast=True), magic + tl.zeros((BLOCK_T,), dtype=tl.uint64))
    rest = mix - quotient.to(tl.int64, bitcast=True) * prime
    row = tl.where(rest >= prime, rest - prime, rest) + tl.load(offsets + slot)
    w = tl.arange(0, BLOCK_W)
    inside = live[:, None] & (w < WIDTH)[None, :]
    values = tl.load(table + row[:, None] * WIDTH + w[None, :], mask=inside, other=0.0)
    tl.store(out + (at * SLOTS + slot)[:, None] * WIDTH + w[None, :], values, mask=inside)


@torch.no_grad()
def triton_gather(
    ngram_hash: NgramHash, table: Float[Tensor, "rows width"], tokens: Int64[Tensor, "B T"]
) -> Float[Tensor, "B T mem"]:
    """The memory vectors of raw token ids.

    Raises: ValueError for a hash with another window or boundary rule than the published demo's.
    """
    if (ngram_hash.window_rule, ngram_hash.boundary) != ("aligned", "none"):
        raise ValueError(
            f"expected window rule 'aligned' and boundary 'none', found {ngram_hash.window_rule!r} and "
            f"{ngram_hash.boundary!r}: take NgramHash and the table's own read"
        )
    compressed = ngram_hash.compress(tokens).contiguous()
    texts, length = compressed.shape
    width, slots = table.shape[1], len(ngram_hash.sizes)
    out = table.new_empty((texts, length, slots * width))
    grid = (triton.cdiv(texts * length, BLOCK_T), slots)
    interpreted = not isinstance(ngram_gather, triton.runtime.JITFunction)
    multipliers, primes, magics, offsets = hash_constants(ngram_hash, tokens.device)
    ngram_gather[grid](
        compressed, multipliers, primes, magics, offsets, table.contiguous(), out, texts, length, ngram_hash.pad,
        SLOTS=slots, HEADS=ngram_hash.heads, ORDERS=ngram_hash.window, WIDTH=width,
        BLOCK_W=triton.next_power_of_2(width), BLOCK_T=BLOCK_T, **({} if interpreted else {"num_warps": WARPS}),
    )  # fmt: skip
    return out


def hash_constants(ngram_hash: NgramHash, device: torch.device) -> tuple[Tensor, ...]:
    """Multipliers, primes, floor(2^64 / prime) as the bits of an int64, offsets."""
    magics = [2**64 // prime for prime in ngram_hash.sizes]
    signed = [magic - 2**64 if magic >= 2**63 else magic for magic in magics]
    lists = (ngram_hash.multipliers, ngram_hash.sizes, signed, ngram_hash.offsets)
    return tuple(torch.tensor(values, dtype=torch.int64, device=device) for values in lists)
