"""Hash and gather without an integer division: token ids in, memory vectors out, into buffers that are used again.

mix mod p costs a 64-bit division per slot, which no CPU vectorises. With mix = h 2^37 + l (h below 2^26), c = 2^37 mod p
and x = h c + l,

    mix mod p = x - p floor((x + 1/2) / p)

and everything stays below 2^50, so float64 holds it exactly; the half keeps the quotient at least 1/(2p) from an integer,
and its rounding error is below 1/(5p) for p < 2^23. x of all S slots is one matrix product of (h, l, 1) with a constant
matrix, and so is the quotient. The rest of the time is the gather; a fresh output would cost as much again in page
faults, so the buffer is kept. Larger heads (DeepSeek-V4.1) take `NgramHash`'s own modulus, and so do tables whose hash
differs in window or boundary, for whom only the mix is different. CUDA: `engram_interp.kernels.triton_ngram`.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch

from engram_interp.memory.hashing import NgramHash
from engram_interp.shapes import Float, Int64, Tensor

_SPLIT = 37
_LARGEST_HEAD = 2**23
_BLOCK = 2048  # tokens whose addresses are formed in the second-level cache


class NgramReader:
    """The memory vectors of one Engram layer.

    >>> import engram_interp
    >>> model = engram_interp.load("mini-engram")
    >>> engram, tokens = model.engram(model.engram_layers[0]), model.to_tokens("Alexander the Great")
    >>> reader = NgramReader(engram.ngram_hash, engram.table.weight)
    >>> vectors = reader.read(tokens)  # overwritten by the next call
    >>> bool((vectors == engram.read(engram.ngram_hash.slots(tokens))).all())
    True
    """

    def __init__(self, ngram_hash: NgramHash, table: Float[Tensor, "rows width"]) -> None:
        if table.shape[0] < ngram_hash.rows:
            raise ValueError(f"expected a table of at least {ngram_hash.rows} rows, found {table.shape[0]}")
        if table.device.type != "cpu":
            raise ValueError(
                f"expected a table on the CPU, found {table.device}: take triton_ngram.triton_gather there"
            )
        self.ngram_hash = ngram_hash
        self.table = table.detach()
        self._address = _AddressMatrix.of(ngram_hash) if max(ngram_hash.sizes) < _LARGEST_HEAD else None
        self._rows = torch.empty(_BLOCK, len(ngram_hash.sizes), dtype=torch.int64)
        self._vectors = self.table.new_empty(0)

    @torch.no_grad()
    def rows(self, tokens: Int64[Tensor, "B T"]) -> Int64[Tensor, "B T S"]:
        """Row of the flat table that every slot reads.

        Raises: ValueError naming the first id outside the vocabulary.
        """
        out = torch.empty(tokens.numel(), len(self.ngram_hash.sizes), dtype=torch.int64)
        for mix, part in zip(self._mixes(tokens), out.split(_BLOCK), strict=True):
            self._put_rows(mix, part)
        return out.view(*tokens.shape, -1)

    @torch.no_grad()
    def read(self, tokens: Int64[Tensor, "B T"]) -> Float[Tensor, "B T mem"]:
        """The rows of all slots, concatenated; the buffer is overwritten by the next call.

        Raises: ValueError naming the first id outside the vocabulary.
        """
        slots = len(self.ngram_hash.sizes)
        if len(self._vectors) != tokens.numel() * slots:
            self._vectors = self.table.new_empty(tokens.numel() * slots, self.table.shape[1])
        for mix, vectors in zip(self._mixes(tokens), self._vectors.split(_BLOCK * slots), strict=True):
            rows = self._rows[: len(mix)]
            self._put_rows(mix, rows)
            _gather(self.table, rows.flatten(), vectors)
        return self._vectors.view(*tokens.shape, -1)

    def _mixes(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return self.ngram_hash.mix(self.ngram_hash.compress(tokens)).flatten(0, 1).split(_BLOCK)

    def _put_rows(self, mix: Tensor, out: Tensor) -> None:
        if self._address is not None:
            self._address.rows(mix, out)
        else:
            out.copy_(self.ngram_hash.rows_of_slots(self.ngram_hash.slots_of_mix(mix[None])[0]))


def _gather(table: Tensor, rows: Tensor, out: Tensor) -> None:
    if table.dtype == torch.bfloat16:  # numpy has none
        torch.index_select(table, 0, rows, out=out)
    else:  # numpy moves rows of 32 bytes at three times the speed of index_select; "clip": every row exists
        np.take(table.numpy(), rows.numpy(), 0, out=out.numpy(), mode="clip")


class _AddressMatrix:
    """Constants of the two products, float64 [2N + 1, S], and work space for a block of tokens."""

    def __init__(self, value: Tensor, quotient: Tensor, sizes: Tensor) -> None:
        self.value, self.quotient = value, quotient
        self.sizes = sizes.expand(_BLOCK, -1).contiguous()  # a broadcast axis of S is slower than reading it
        self.parts = torch.ones(_BLOCK, len(value), dtype=torch.float64)
        self.x, self.q = torch.empty_like(self.sizes), torch.empty_like(self.sizes)

    @classmethod
    def of(cls, ngram_hash: NgramHash) -> _AddressMatrix:
        sizes, orders = ngram_hash.sizes, len(ngram_hash.orders)
        value = torch.zeros(2 * orders + 1, len(sizes), dtype=torch.float64)
        quotient = torch.zeros_like(value)
        for slot, (prime, offset) in enumerate(zip(sizes, ngram_hash.offsets, strict=True)):
            order = slot // ngram_hash.heads
            carry = 2**_SPLIT % prime
            value[[2 * order, 2 * order + 1, -1], slot] = torch.tensor([carry, 1, offset + 0.5], dtype=torch.float64)
            exact = (Fraction(carry, prime), Fraction(1, prime), Fraction(1, 2 * prime))  # rounded once each
            quotient[[2 * order, 2 * order + 1, -1], slot] = torch.tensor(
                [float(f) for f in exact], dtype=torch.float64
            )
        return cls(value, quotient, torch.tensor(sizes, dtype=torch.float64))

    def rows(self, mix: Tensor, out: Tensor) -> None:
        n = len(mix)
        parts, x, q = self.parts[:n], self.x[:n], self.q[:n]
        parts[:, 0:-1:2] = mix >> _SPLIT
        parts[:, 1:-1:2] = mix & (2**_SPLIT - 1)
        torch.mm(parts, self.value, out=x)
        torch.mm(parts, self.quotient, out=q)
        out.copy_(x.addcmul_(q.floor_(), self.sizes[:n], value=-1))  # r + offset + 1/2, cut to an integer
