"""The lens on CUDA: no logit leaves the chip. Triton kernels `lens_tile` and `lens_delta`, and their launches.

`lens_tile`: one program forms one [BLOCK_N, BLOCK_V] tile of logits and stores, per row, its maximum, the sum of
exp(z - maximum) and the first argmax; the tiles' partials are joined in float64 outside, so that no program waits for
another and the sums do not depend on an order. `lens_delta`: the same tiles of z and of the change x, summing
p (expm1(x) - x). Each stands beside its float64 reference in `engram_interp.kernels.{partition,delta}`.

`UPCAST` casts to float32 before any arithmetic: Triton's interpreter multiplies the bit patterns of bfloat16. float32
products are three tf32 ones on tensor cores (plain float32 ones spill and use none); the interpreter ignores that choice,
so what it costs shows only in the error that `lens_kl` measures on its own tokens. Import this module only where
Triton is installed. No speed on a GPU is claimed: these kernels were checked by the interpreter and by compiling them for
sm_80 and sm_90 (`tests/test_triton.py`), never timed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float64

from engram_interp.kernels.partition import Partition
from engram_interp.shapes import Float, Tensor

PRECISION = "tf32x3"
# (tile, launch) by kernel and dtype: the largest of those tried that spill nothing on sm_80 and sm_90
_WIDE = {"BLOCK_N": 64, "BLOCK_V": 128, "BLOCK_D": 64}, {"num_warps": 4, "num_stages": 3}
_TALL = {"BLOCK_N": 128, "BLOCK_V": 64, "BLOCK_D": 64}, {"num_warps": 8, "num_stages": 3}  # two accumulators
_SMALL = {"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_D": 32}, {"num_warps": 4, "num_stages": 2}  # split float32
PLANS = {
    ("lens_tile", torch.bfloat16): _WIDE,
    ("lens_delta", torch.bfloat16): _TALL,
    ("lens_tile", torch.float32): _SMALL,
    ("lens_delta", torch.float32): _SMALL,
}
_MEAN_TILE = (4096, 8192)  # rows and columns of logits that the final layer's mean holds at once


@triton.jit
@no_type_check
def _tile_dot(a, b, rows, columns, n, v, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
              BLOCK_D: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """a[rows] @ b[columns].T in float32; rows and columns beyond n and v count as zero."""
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        left = tl.load(
            a + rows.to(tl.int64)[:, None] * D + k[None, :], mask=(rows < n)[:, None] & (k < D)[None, :], other=0.0
        )
        right = tl.load(
            b + columns.to(tl.int64)[None, :] * D + k[:, None],
            mask=(columns < v)[None, :] & (k < D)[:, None],
            other=0.0,
        )
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


@triton.jit
@no_type_check
def lens_tile(hidden, head, peak, total, best, n, v, tiles, D: tl.constexpr, BLOCK_N: tl.constexpr,
              BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Partials of one tile; `peak`, `total`, `best` are [n, tiles]."""
    tile = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    z = _tile_dot(hidden, head, rows, columns, n, v, D, BLOCK_N, BLOCK_V, BLOCK_D, UPCAST, PRECISION)
    z = tl.where((columns < v)[None, :], z, float("-inf"))
    top = tl.max(z, 1)
    at = rows.to(tl.int64) * tiles + tile
    tl.store(peak + at, top, mask=rows < n)
    tl.store(total + at, tl.sum(tl.exp(z - top[:, None]), 1), mask=rows < n)
    tl.store(best + at, tl.argmax(z, 1) + tile * BLOCK_V, mask=rows < n)


@triton.jit
@no_type_check
def lens_delta(final, change, head, log_z, centre, total, n, v, tiles, D: tl.constexpr, BLOCK_N: tl.constexpr,
               BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """sum over one tile of p (expm1(x) - x), p = exp(z - log_z), x = change . w - centre."""
    tile = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    z = _tile_dot(final, head, rows, columns, n, v, D, BLOCK_N, BLOCK_V, BLOCK_D, UPCAST, PRECISION)
    p = tl.exp(z - tl.load(log_z + rows, mask=rows < n, other=0.0)[:, None])
    x = _tile_dot(change, head, rows, columns, n, v, D, BLOCK_N, BLOCK_V, BLOCK_D, UPCAST, PRECISION)
    x = x - tl.load(centre + rows, mask=rows < n, other=0.0)[:, None]
    # expm1(x) - x cancels near 0; seven terms of its series are exact to 1e-7 below 0.35
    series = x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040))))))
    term = tl.where(tl.abs(x) < 0.35, series, tl.exp(x) - 1.0 - x)
    term = tl.where((columns < v)[None, :], p * term, 0.0)
    tl.store(total + rows.to(tl.int64) * tiles + tile, tl.sum(term, 1), mask=rows < n)


@torch.no_grad()
def triton_partition(
    hidden: Float[Tensor, "N D"], head: Float[Tensor, "V D"], *, mean: bool = False, top1: bool = True
) -> Partition:
    """See `exact_partition`; on the device of `hidden`, in the dtype of `head`. `top1` is always given."""
    hidden, head = hidden.to(head.dtype).contiguous(), head.contiguous()
    launch = _Launch.of("lens_tile", hidden, head)
    peak, total = (hidden.new_empty((launch.n, launch.tiles), dtype=torch.float32) for _ in range(2))
    best = torch.empty_like(peak, dtype=torch.int32)
    lens_tile[launch.grid](hidden, head, peak, total, best, *launch.sizes, **launch.options)
    highest = peak.amax(1, keepdim=True)
    mass = (total.double() * (peak - highest).double().exp()).sum(1)
    log_z = highest.squeeze(1).double() + mass.log()
    first = torch.where(peak == highest, best, launch.v).amin(1).long()
    return Partition(log_z, _mean(hidden, head, log_z) if mean else None, first)


@torch.no_grad()
def triton_delta(
    final: Float[Tensor, "N D"], change: Float[Tensor, "N D"], head: Float[Tensor, "V D"], base: Partition
) -> Float64[Tensor, " N"]:
    """See `engram_interp.kernels.delta.delta_kl`."""
    assert base.mean is not None
    launch = _Launch.of("lens_delta", final, head)
    centre = torch.linalg.vecdot(change.double(), base.mean.double()).float()
    total = base.log_z.new_empty((launch.n, launch.tiles), dtype=torch.float32)
    lens_delta[launch.grid](
        final.to(head.dtype).contiguous(), change.to(head.dtype).contiguous(), head.contiguous(), base.log_z.float(),
        centre, total, *launch.sizes, **launch.options,
    )  # fmt: skip
    return torch.log1p(total.double().sum(1))


@dataclass(frozen=True)
class _Launch:
    """Sizes and options of one launch."""

    n: int
    v: int
    tiles: int
    grid: tuple[int, int]
    options: dict[str, object]

    @classmethod
    def of(cls, kernel: str, hidden: Tensor, head: Tensor) -> _Launch:
        if (kernel, head.dtype) not in PLANS:
            raise ValueError(f"expected an unembedding in float32 or bfloat16, found {head.dtype}")
        tile, launch = PLANS[kernel, head.dtype]
        n, v = len(hidden), len(head)
        row_tiles, tiles = -(-n // tile["BLOCK_N"]), -(-v // tile["BLOCK_V"])
        interpreted = not isinstance(lens_tile, triton.runtime.JITFunction)
        options: dict[str, object] = {**tile, "D": hidden.shape[1], "UPCAST": interpreted, "PRECISION": PRECISION}
        return cls(n, v, tiles, (row_tiles, tiles), options | ({} if interpreted else launch))

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.n, self.v, self.tiles


def _mean(hidden: Tensor, head: Tensor, log_z: Tensor) -> Tensor:
    """sum_v p_v w_v with the library's products; for the final layer only."""
    rows, columns = _MEAN_TILE
    mean = hidden.new_zeros(hidden.shape, dtype=torch.float32)
    for r in range(0, len(hidden), rows):
        block, shift = hidden[r : r + rows].float(), log_z[r : r + rows, None].float()
        for start in range(0, len(head), columns):
            part = head[start : start + columns].float()
            mean[r : r + rows] += torch.mm(block, part.T).sub_(shift).exp_() @ part
    return mean
