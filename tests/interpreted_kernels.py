"""Triton kernels on the CPU: interpreter against float64, bounds of every access, races between programs.

Run by tests/test_triton.py in a process with TRITON_INTERPRET=1, which must be set before a kernel is decorated; pytest
does not collect this file by itself. The interpreter runs programs one after another and reads past the end of a tensor
silently, so `guarded` records every access: an active lane outside every argument is an error, and so are two programs
that store to one element, or one that loads what another stores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from engram_interp.kernels import lens_kl as lens_kl_module
from engram_interp.kernels.delta import delta_reference
from engram_interp.kernels.partition import Partition, exact_partition, partition_reference
from engram_interp.kernels.triton_lens import triton_delta, triton_partition
from engram_interp.kernels.triton_ngram import triton_gather
from engram_interp.memory import CompressedVocabulary, NgramHash

assert os.environ.get("TRITON_INTERPRET") == "1", "run by tests/test_triton.py"


class AccessError(AssertionError):
    """A kernel touched memory that is not its own."""


@contextmanager
def guarded() -> Iterator[None]:
    """Check every load and store of the launches inside."""
    builder, original = interpreter.interpreter_builder, interpreter.GridExecutor._init_args_hst
    bounds: list[tuple[int, int]] = []
    stored: dict[int, tuple] = {}
    loaded: dict[int, set] = {}

    def launch(self, args, kwargs):
        host_args, host_kwargs = original(self, args, kwargs)
        bounds[:] = [
            (a.data_ptr(), a.data_ptr() + a.numel() * a.element_size())
            for a in (*host_args, *host_kwargs.values())
            if isinstance(a, torch.Tensor)
        ]
        stored.clear()
        loaded.clear()
        return host_args, host_kwargs

    def active(pointers, mask) -> np.ndarray:
        found = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        found = found[np.broadcast_to(mask.data, found.shape).astype(bool)].astype(np.int64)
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        inside = np.zeros(len(found), dtype=bool)
        for low, high in bounds:
            inside |= (found >= low) & (found + size <= high)
        if not inside.all():
            raise AccessError(f"program {builder.grid_idx}: {(~inside).sum()} lanes outside every argument")
        return found

    def load(pointers, mask, other, *rest):
        for at in active(pointers, mask).tolist():
            loaded.setdefault(at, set()).add(builder.grid_idx)
            if stored.get(at, builder.grid_idx) != builder.grid_idx:
                raise AccessError(f"programs {stored[at]} and {builder.grid_idx} store and load one element")
        return masked_load(pointers, mask, other, *rest)

    def store(pointers, value, mask, *rest):
        for at in active(pointers, mask).tolist():
            if stored.setdefault(at, builder.grid_idx) != builder.grid_idx or loaded.get(at, set()) - {
                builder.grid_idx
            }:
                raise AccessError(f"program {builder.grid_idx} stores what another program stored or loaded")
        return masked_store(pointers, value, mask, *rest)

    masked_load, masked_store = builder.create_masked_load, builder.create_masked_store
    builder.create_masked_load, builder.create_masked_store = load, store
    interpreter.GridExecutor._init_args_hst = launch
    try:
        yield
    finally:
        del builder.create_masked_load, builder.create_masked_store
        interpreter.GridExecutor._init_args_hst = original


def vectors(seed: int, tokens: int, width: int, vocab: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(vocab, width, generator=generator) / width**0.5 * 4
    return torch.randn(tokens, width, generator=generator).to(dtype), head.to(dtype)


SHAPES = [(1, 16, 1), (70, 72, 300), (64, 64, 128), (65, 100, 129)]


@pytest.mark.parametrize(("tokens", "width", "vocab"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tile_is_the_float64_partition(tokens, width, vocab, dtype):
    hidden, head = vectors(tokens, tokens, width, vocab, dtype)
    with guarded():
        found = triton_partition(hidden, head, mean=True)
    log_z, mean, top1 = partition_reference(hidden.double().numpy(), head.double().numpy())
    np.testing.assert_allclose(found.log_z, log_z, atol=1e-5)
    np.testing.assert_allclose(found.mean, mean, atol=1e-4)
    assert (found.top1.numpy() == top1).all()


def test_ties_go_to_the_lowest_id_across_tiles():
    hidden, head = vectors(3, 20, 32, 400)
    head[150] = head[90] = head[390] = 3 * hidden[7]
    assert triton_partition(hidden, head).top1[7] == 90


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
def test_delta_keeps_its_digits(size):
    final, head = vectors(5, 66, 72, 200)
    change = size * torch.randn(final.shape, generator=torch.Generator().manual_seed(1))
    with guarded():
        found = triton_delta(final, change, head, exact_partition(final, head, mean=True))
    expected = delta_reference(final.double().numpy(), change.double().numpy(), head.double().numpy())
    np.testing.assert_allclose(found, expected, rtol=3e-5)


def test_delta_of_bfloat16_vectors():
    final, head = vectors(6, 20, 32, 140, torch.bfloat16)
    change = (0.1 * torch.randn(20, 32, generator=torch.Generator().manual_seed(2))).bfloat16()
    log_z, mean, _ = partition_reference(final.double().numpy(), head.double().numpy())
    found = triton_delta(final, change, head, Partition(torch.from_numpy(log_z), torch.from_numpy(mean)))
    expected = delta_reference(final.double().numpy(), change.double().numpy(), head.double().numpy())
    np.testing.assert_allclose(found, expected, rtol=3e-5)


@pytest.mark.parametrize(("texts", "length", "width"), [(1, 1, 4), (3, 7, 8), (2, 33, 12)])
def test_gather_is_the_hash_and_the_rows_bit_for_bit(texts, length, width):
    vocabulary = CompressedVocabulary.identity(500)
    multipliers = (9_007_199_254_740_993, 18_446_744_073_709 * 500 + 1, 3_458_764_513_820_541)
    ngram_hash = NgramHash(vocabulary, multipliers, ((61, 67), (71, 73)), pad=2)
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(0, 500, (texts, length), generator=generator)
    table = torch.randn(ngram_hash.rows, width, generator=generator)
    with guarded():
        found = triton_gather(ngram_hash, table, tokens)
    rows = ngram_hash.rows_of_slots(ngram_hash.slots(tokens))
    assert found.equal(table[rows].flatten(-2))


def test_a_head_in_float64_is_refused():
    hidden, head = vectors(7, 4, 16, 30, torch.float64)
    with pytest.raises(ValueError, match=r"float32 or bfloat16, found torch.float64"):
        triton_partition(hidden, head)


def test_the_lens_through_the_kernels(monkeypatch):
    choice = lens_kl_module.PathChoice("triton", "kernels", "test")
    monkeypatch.setattr(lens_kl_module, "choose_path", lambda device, path, top1: choice)
    final, head = vectors(8, 40, 32, 300)
    noise = torch.Generator().manual_seed(3)
    sites = torch.stack([final + size * torch.randn(40, 32, generator=noise) for size in (1.0, 1e-3)] + [final])
    found = lens_kl_module.lens_kl(sites, final, head, torch.full((40,), 3), path="triton", top1=True)
    expected = lens_kl_module.lens_kl_reference(sites.double(), final.double(), head.double())
    torch.testing.assert_close(found.kl.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.kl[1].double(), expected[1], atol=0, rtol=1e-3)  # lens_delta
    assert found.final_top1.equal((final @ head.T).argmax(-1))


def test_gather_refuses_other_rules():
    vocabulary = CompressedVocabulary.identity(50)
    ngram_hash = NgramHash(vocabulary, (3, 5), ((7, 11),), pad=2, boundary="reset", eos=1)
    with pytest.raises(ValueError, match="boundary 'none', found 'aligned' and 'reset'"):
        triton_gather(ngram_hash, torch.zeros(18, 4), torch.zeros(1, 3, dtype=torch.int64))


# -- the guard itself catches what it is there for ---------------------------------------------------------------------


@triton.jit
def copy_unmasked(source, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(source + at), mask=at < n)


@triton.jit
def write_one_place(source, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out, tl.sum(tl.load(source + at, mask=at < n, other=0.0), 0))


@triton.jit
def shift_in_place(source, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(source + at, tl.load(source + at + 1, mask=at + 1 < n, other=0.0), mask=at < n)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (copy_unmasked, "4 lanes outside"),
        (write_one_place, "another program"),
        (shift_in_place, "another program|one element"),
    ],
)
def test_the_guard_catches_planted_errors(kernel, message):
    source, out = torch.ones(28), torch.zeros(28)
    with guarded(), pytest.raises(interpreter.InterpreterError, match=message):
        kernel[(4,)](source, out, 28, BLOCK=8)
