"""What normalises a prediction, and which vector does it expect, without its logits in memory?

For hidden vectors h [N, D] and an unembedding W [V, D] without bias or soft cap, z = h W':

    log_z = log sum_v exp z_v        mean = sum_v p_v w_v        top1 = argmax_v z_v

`exact_partition` computes tiles of [rows, columns] logits in one float32 buffer and keeps running sums in float64; z is
formed in units of log 2, because torch's exp2 costs a third of its exp. `bfloat16_partition` rounds h and W once and lets
each tile come out in bfloat16 *after* the row's shift was subtracted inside the product (three extra columns hold the
shift to 24 bits), so that the rounding of a logit is relative to its distance from the top, not to its size.
`flash_partition` reads (mean, log_z) off a flash attention with q = h, k = v = W; it does the product twice and pays only
where bfloat16 products are several times faster (AMX).

Cost: one product of 2 N V D operations and 8 % for the rest on one AVX-512 core; a mean is one more. Memory: one tile of
1 MB (bfloat16: 1 MB and 2 MB in float32). Misleads: rounding h and W to bfloat16 moves log_z by about 1e-2 nats; results
of the fast paths carry the error that was measured on a sample of their own tokens (`engram_interp.kernels.lens_kl`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64

from engram_interp.shapes import Float, Int64, Tensor

ROWS, COLUMNS = 512, 512  # one float32 tile of 1 MB stays in the second-level cache
_ROUNDED_COLUMNS = 1024  # bfloat16 products gain more from longer rows than the passes over the tile lose
_LOG2E = math.log2(math.e)
_SHIFT_COLUMNS = 16  # bfloat16 products want widths that are multiples of 16
_SLACK = 4.0  # log 2 units above the shift up to which bfloat16 is finer than what rounding h and W costs anyway


@dataclass(frozen=True, eq=False)
class Partition:
    """log_z in float64; mean and top1 where they were asked for."""

    log_z: Float64[Tensor, " N"]
    mean: Float[Tensor, "N D"] | None = None
    top1: Int64[Tensor, " N"] | None = None


@torch.no_grad()
def exact_partition(
    hidden: Float[Tensor, "N D"], head: Float[Tensor, "V D"], *, mean: bool = False, top1: bool = False
) -> Partition:
    """Tile by tile in the dtype of `hidden` (float32 or float64).

    Raises: ValueError for a dtype below float32.
    """
    if hidden.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected hidden vectors in float32 or float64, found {hidden.dtype}")
    tile = hidden.new_empty(min(ROWS, len(hidden)) * min(COLUMNS, len(head)))
    parts = [_exact_rows(rows, head, tile, mean, top1) for rows in hidden.split(ROWS)]
    return _joined(parts) if parts else _nothing(hidden, mean, top1)


def _exact_rows(hidden: Tensor, head: Tensor, tile: Tensor, mean: bool, top1: bool) -> Partition:
    scaled = hidden * _LOG2E
    running = _Running.start(hidden, mean, top1)
    for start in range(0, len(head), COLUMNS):
        columns = head[start : start + COLUMNS].to(hidden.dtype)
        z = tile[: len(hidden) * len(columns)].view(len(hidden), len(columns))
        torch.mm(scaled, columns.T, out=z)
        running.add(z, columns, start)
    return running.finish()


@dataclass
class _Running:
    """Sums of 2^(z - peak) over the columns seen so far."""

    peak: Tensor
    total: Tensor
    mean: Tensor | None
    top1: Tensor | None

    @classmethod
    def start(cls, hidden: Tensor, mean: bool, top1: bool) -> _Running:
        n = len(hidden)
        return cls(
            hidden.new_full((n,), -torch.inf),
            hidden.new_zeros(n, dtype=torch.float64),
            torch.zeros_like(hidden) if mean else None,
            hidden.new_zeros(n, dtype=torch.int64) if top1 else None,
        )

    def add(self, z: Tensor, columns: Tensor, start: int) -> None:
        """Take a tile of logits in units of log 2; it is overwritten."""
        top = z.amax(1)
        peak = torch.maximum(self.peak, top)
        if self.top1 is not None:
            rows = torch.nonzero(top > self.peak).squeeze(1)  # few after the first tile
            self.top1[rows] = z[rows].argmax(1) + start
        shrink = torch.exp2(self.peak - peak)
        z.sub_(peak[:, None]).exp2_()
        self.total.mul_(shrink).add_(z.sum(1))
        if self.mean is not None:
            self.mean.mul_(shrink[:, None]).addmm_(z, columns)
        self.peak = peak

    def finish(self) -> Partition:
        log_z = (self.peak.double() + self.total.log2()) / _LOG2E
        mean = self.mean if self.mean is None else self.mean / self.total[:, None].to(self.mean.dtype)
        return Partition(log_z, mean, self.top1)


def _joined(parts: list[Partition]) -> Partition:
    mean, top1 = [p.mean for p in parts if p.mean is not None], [p.top1 for p in parts if p.top1 is not None]
    log_z = torch.cat([p.log_z for p in parts])
    return Partition(log_z, torch.cat(mean) if mean else None, torch.cat(top1) if top1 else None)


def _nothing(hidden: Tensor, mean: bool, top1: bool) -> Partition:
    return _Running.start(hidden, mean, top1).finish()


@dataclass(frozen=True, eq=False)
class RoundedHead:
    """W in bfloat16 with columns of ones for the shift; make it once per model."""

    weight: Float[Tensor, "V wide"]
    width: int

    @classmethod
    def of(cls, head: Float[Tensor, "V D"]) -> RoundedHead:
        """Round a head."""
        width = head.shape[1]
        weight = head.new_empty(len(head), width + _SHIFT_COLUMNS, dtype=torch.bfloat16)
        weight[:, :width] = head
        weight[:, width : width + 3] = 1
        weight[:, width + 3 :] = 0
        return cls(weight, width)

    @property
    def plain(self) -> Float[Tensor, "V D"]:
        """The rounded W itself, bfloat16."""
        return self.weight[:, : self.width]

    def read(self, hidden: Float[Tensor, "*any D"]) -> Float[Tensor, "*any D"]:
        """Hidden vectors as `bfloat16_partition` rounds them, in float32."""
        return (hidden * _LOG2E).bfloat16().float() / _LOG2E


@torch.no_grad()
def bfloat16_partition(hidden: Float[Tensor, "N D"], head: RoundedHead) -> Partition:
    """log_z from bfloat16 tiles that the product itself has shifted; no mean."""
    wide = torch.zeros(len(hidden), head.weight.shape[1], dtype=torch.bfloat16)
    wide[:, : head.width] = hidden * _LOG2E
    tile = torch.empty(min(ROWS, len(hidden)) * min(_ROUNDED_COLUMNS, len(head.weight)), dtype=torch.bfloat16)
    parts = [_shifted_rows(rows, head, tile) for rows in wide.split(ROWS)]
    return _joined(parts) if parts else _nothing(hidden, False, False)


def _shifted_rows(wide: Tensor, head: RoundedHead, tile: Tensor) -> Partition:
    n, weight = len(wide), head.weight
    peak = _expected_peak(wide[:, : head.width], weight[:, : head.width])
    _put_shift(wide, head.width, peak)
    total = torch.zeros(n, dtype=torch.float64)
    exact = torch.empty(tile.numel(), dtype=torch.float32)
    for start in range(0, len(weight), _ROUNDED_COLUMNS):
        columns = weight[start : start + _ROUNDED_COLUMNS]
        z = exact[: n * len(columns)].view(n, len(columns))
        z.copy_(torch.mm(wide, columns.T, out=tile[: z.numel()].view_as(z)))
        top = z.amax(1)
        rows = torch.nonzero(top > _SLACK).squeeze(1)  # far beyond the shift: form these rows again under a better one
        if len(rows):
            raised = peak[rows] + top[rows]
            total[rows] *= torch.exp2(peak[rows] - raised)
            peak[rows] = raised
            again = wide[rows]
            _put_shift(again, head.width, raised)
            wide[rows], z[rows] = again, torch.mm(again, columns.T).float()
        total += z.exp2_().sum(1)
    return Partition((peak.double() + total.log2()) / _LOG2E)


def _expected_peak(hidden: Tensor, weight: Tensor) -> Tensor:
    """Where the largest of V logits would be if they were normal, from the moments of a few."""
    sample = (hidden @ weight[:: max(1, len(weight) // 64)].T).float()
    return sample.mean(1) + sample.std(1, correction=0) * math.sqrt(2 * math.log(len(weight)))


def _put_shift(wide: Tensor, width: int, shift: Tensor) -> None:
    """-shift as the sum of three bfloat16 columns."""
    rest = -shift
    for column in range(width, width + 3):
        wide[:, column] = rest
        rest = rest - wide[:, column].float()


@torch.no_grad()
def flash_partition(hidden: Float[Tensor, "N D"], head: Float[Tensor, "V D"]) -> Partition:
    """(mean, log_z) from torch's flash attention on the CPU, in the dtype of `head`.

    Raises: RuntimeError where this torch has no such operator (it is private).
    """
    attention = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if attention is None:
        raise RuntimeError("this torch has no _scaled_dot_product_flash_attention_for_cpu")
    key = head[None, None]
    mean, log_z = attention(hidden.to(head.dtype)[None, None], key, key, scale=1.0)
    return Partition(log_z.flatten().double(), mean[0, 0])


def partition_reference(
    hidden: Float64[np.ndarray, "N D"], head: Float64[np.ndarray, "V D"]
) -> tuple[Float64[np.ndarray, " N"], Float64[np.ndarray, "N D"], np.ndarray]:
    """The obvious version in float64: log_z, mean, top1."""
    z = hidden @ head.T
    peak = z.max(1, keepdims=True)
    weights = np.exp(z - peak)
    return (
        np.log(weights.sum(1)) + peak[:, 0],
        (weights / weights.sum(1, keepdims=True)) @ head,
        z.argmax(1),
    )
