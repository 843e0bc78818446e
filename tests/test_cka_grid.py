"""Is the streamed grid the unbiased CKA of all rows, for any chunking, order and split?"""

from __future__ import annotations

import math

import pytest
import torch

from engram_interp.kernels.cka import CKAGrid
from engram_interp.measure.cka import cka_matrix


def layers(seed: int, n: int, widths: tuple[int, ...], mean: float = 0.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, 6, generator=generator)
    return [
        shared @ torch.randn(6, w, generator=generator) + torch.randn(n, w, generator=generator) + mean for w in widths
    ]


def streamed(a, b, chunks) -> CKAGrid:
    grid, start = CKAGrid([x.shape[1] for x in a], [y.shape[1] for y in b]), 0
    for size in chunks:
        grid.update([x[start : start + size] for x in a], [y[start : start + size] for y in b])
        start += size
    assert grid.n == len(a[0]) == start
    return grid


@pytest.mark.parametrize("chunks", [(200,), (1, 99, 0, 100), (64, 64, 64, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grid_is_the_full_sample_value(chunks, dtype):
    a, b = ([x.to(dtype) for x in layers(s, 200, w, 3.0)] for s, w in ((0, (5, 9, 12)), (1, (7, 16))))
    found = streamed(a, b, chunks).result()
    expected = cka_matrix(a, b, companions=True)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(found.values, torch.from_numpy(expected.values), atol=tolerance, rtol=0)
    torch.testing.assert_close(found.biased, torch.from_numpy(expected.companions["biased"]), atol=tolerance, rtol=0)


def test_a_split_over_processes_changes_nothing():
    a, b = ([x.double() for x in layers(s, 150, w, -2.0)] for s, w in ((2, (5, 9)), (3, (7, 4))))
    whole = streamed(a, b, (150,)).result()
    parts = [
        streamed([x[s] for x in a], [y[s] for y in b], (s.stop - s.start,)) for s in (slice(0, 40), slice(40, 150))
    ]
    other = CKAGrid.from_state(*parts[1].widths, parts[1].state())
    before = {k: v.clone() for k, v in other.state().items()}
    merged = CKAGrid((5, 9), (7, 4)).merge(parts[0]).merge(other).merge(CKAGrid((5, 9), (7, 4)))
    torch.testing.assert_close(merged.result().values, whole.values, atol=1e-11, rtol=0)
    torch.testing.assert_close(merged.result().biased, whole.biased, atol=1e-11, rtol=0)
    assert all(torch.equal(before[k], v) for k, v in other.state().items())


def test_float32_rounding_far_from_the_origin():
    a, b = layers(4, 3000, (16, 16), mean=100.0), layers(5, 3000, (16,), mean=-50.0)
    found = streamed(a, b, (1000, 1000, 1000)).result().values
    exact = streamed([x.double() for x in a], [y.double() for y in b], (3000,)).result().values
    torch.testing.assert_close(found, exact, atol=1e-6, rtol=0)


def test_bad_input():
    grid = CKAGrid((3,), (4, 5))
    a, b = layers(6, 10, (3,)), layers(7, 10, (4, 5))
    with pytest.raises(ValueError, match=r"widths \(4, 5\) on side b, found \(3,\)"):
        grid.update(a, a)
    with pytest.raises(ValueError, match="both sides, found 10 and 9"):
        grid.update(a, [y[1:] for y in b])
    b[1][3, 2] = math.inf
    with pytest.raises(ValueError, match="layer 1 of side b"):
        grid.update(a, b)
    with pytest.raises(ValueError, match="at least 4 rows, found 0"):
        grid.result()
    with pytest.raises(ValueError, match="found"):
        grid.merge(CKAGrid((3,), (4,)))
    constant = CKAGrid((3,), (4,)).update([torch.ones(9, 3)], layers(8, 9, (4,))).result()
    assert constant.values.isnan().all()
