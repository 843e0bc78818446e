"""Do the fast lens paths give the float64 divergence, say by how much they miss, and choose as they document?"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engram_interp.kernels import lens_kl as module
from engram_interp.kernels.delta import delta_kl, delta_reference
from engram_interp.kernels.lens import LensError
from engram_interp.kernels.lens_kl import choose_path, lens_kl, lens_kl_reference, plain_head, sampled_error
from engram_interp.kernels.partition import (
    RoundedHead,
    bfloat16_partition,
    exact_partition,
    flash_partition,
    partition_reference,
)

CPU = torch.device("cpu")


def head_and_hidden(seed: int, tokens: int, width: int, vocab: int, spread: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(vocab, width, generator=generator) * spread / width**0.5 * 4
    return head, torch.randn(tokens, width, generator=generator)


def sites_near(final: torch.Tensor, count: int, seed: int = 0) -> torch.Tensor:
    """Sites that differ from `final` by less and less; the last one is `final`."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(count, *final.shape, generator=generator) * torch.logspace(0, -4, count)[:, None, None]
    steps[-1] = 0
    return final + steps


def targets_of(tokens: int, vocab: int) -> torch.Tensor:
    targets = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(5))
    targets[-1:] = -1
    return targets


# -- partitions --------------------------------------------------------------------------------------------------------

SIZES = [(1, 8, 3, 1.0), (513, 24, 700, 1.0), (40, 33, 1025, 6.0), (7, 16, 512, 0.1)]


@pytest.mark.parametrize(("tokens", "width", "vocab", "spread"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_partition_is_the_float64_one(tokens, width, vocab, spread, dtype):
    head, hidden = head_and_hidden(tokens, tokens, width, vocab, spread)
    log_z, mean, top1 = partition_reference(hidden.double().numpy(), head.double().numpy())
    found = exact_partition(hidden.to(dtype), head.to(dtype), mean=True, top1=True)
    scale = float(np.abs(log_z).max())
    single = dtype == torch.float32
    np.testing.assert_allclose(found.log_z, log_z, atol=(3e-7 if single else 1e-14) * max(scale, 1))
    np.testing.assert_allclose(found.mean, mean, atol=(2e-6 if single else 1e-13) * max(scale, 10))
    assert (found.top1.numpy() == top1).all()


def test_exact_partition_of_nothing_and_of_ties():
    head, hidden = head_and_hidden(0, 2, 8, 1500)
    assert exact_partition(hidden[:0], head, mean=True, top1=True).mean.shape == (0, 8)
    head[700] = head[1400] = 40 * hidden[0]
    assert exact_partition(hidden, head, top1=True).top1[0] == 700  # the lowest id among equals
    with pytest.raises(ValueError, match="found torch.bfloat16"):
        exact_partition(hidden.bfloat16(), head)


@pytest.mark.parametrize(("tokens", "width", "vocab", "spread"), SIZES)
def test_bfloat16_partition_is_near_that_of_the_rounded_model(tokens, width, vocab, spread):
    head, hidden = head_and_hidden(tokens, tokens, width, vocab, spread)
    rounded = RoundedHead.of(head)
    read, plain = rounded.read(hidden).double().numpy(), rounded.plain.double().numpy()
    log_z, _, _ = partition_reference(read, plain)
    found = bfloat16_partition(hidden, rounded).log_z
    # A logit is rounded by 2^-9 of its distance from the row's shift, and that is a few deviations of the logits
    np.testing.assert_allclose(found, log_z, atol=2**-9 * 16 * max(spread, 1))


def test_bfloat16_partition_survives_logits_far_above_the_expected_peak():
    head, hidden = head_and_hidden(3, 20, 32, 2000)
    head[1999] = 30 * hidden[4]  # about a thousand nats above the others, in the last tile
    rounded = RoundedHead.of(head)
    read, plain = rounded.read(hidden).double().numpy(), rounded.plain.double().numpy()
    expected = partition_reference(read, plain)[0]
    assert expected.max() > 900
    np.testing.assert_allclose(bfloat16_partition(hidden, rounded).log_z, expected, atol=2**-9 * 16)


def test_flash_partition_in_float32():
    head, hidden = head_and_hidden(6, 30, 32, 900)
    log_z, mean, _ = partition_reference(hidden.double().numpy(), head.double().numpy())
    found = flash_partition(hidden, head)
    np.testing.assert_allclose(found.log_z, log_z, atol=1e-5)
    np.testing.assert_allclose(found.mean, mean, atol=1e-5)


# -- small changes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 1e-1, 1e-2, 1e-3, 1e-4])
def test_delta_keeps_its_digits_at_every_size(size):
    head, final = head_and_hidden(1, 40, 32, 1100)
    change = size * torch.randn(final.shape, generator=torch.Generator().manual_seed(2))
    found = delta_kl(final, change, head, exact_partition(final, head, mean=True))
    expected = delta_reference(final.double().numpy(), change.double().numpy(), head.double().numpy())
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    assert (found >= 0).all()
    with pytest.raises(ValueError, match="mean=True"):
        delta_kl(final, change, head, exact_partition(final, head))


# -- lens --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "vocab"), [(1, 50), (70, 700), (600, 1100)])
def test_exact_lens_agrees_with_float64(tokens, vocab):
    head, final = head_and_hidden(tokens, tokens, 32, vocab)
    sites, targets = sites_near(final, 6), targets_of(tokens, vocab)
    found = lens_kl(sites, final, head, targets, top1=True)
    expected = lens_kl_reference(sites.double(), final.double(), head.double())
    np.testing.assert_allclose(found.kl, expected, atol=1e-5)
    small = expected[:-1] < 0.99e-3
    np.testing.assert_allclose(found.kl[:-1][small], expected[:-1][small], rtol=1e-4)
    assert (found.kl[-1] == 0).all()
    assert (found.kl >= 0).all()
    loss = -(sites.double() @ head.double().T).log_softmax(-1).gather(-1, targets.clamp_min(0).expand(6, -1)[..., None])
    np.testing.assert_allclose(found.cross_entropy[:, :-1], loss[:, :-1, 0], atol=1e-5)
    assert found.cross_entropy[:, -1].isnan().all()
    assert found.top1.equal((sites @ head.T).argmax(-1))
    assert found.choice.path == "exact"
    assert found.checked == min(tokens, 16)
    assert found.error <= 1e-5


@pytest.mark.parametrize("kind", ["bfloat16", "flash"])
def test_fast_lens_states_its_own_error(kind, monkeypatch):
    choice = module.PathChoice(kind, kind, "test")
    monkeypatch.setattr(module, "choose_path", lambda device, path, top1: choice)
    head, final = head_and_hidden(9, 600, 32, 1100)
    sites, targets = sites_near(final, 5), targets_of(600, 1100)
    found = lens_kl(sites, final, head, targets, path="fast")
    deviation = (found.kl - lens_kl_reference(sites.double(), final.double(), head.double())).abs()
    sampled = torch.arange(found.checked) * 600 // found.checked
    assert found.error == pytest.approx(float(deviation[:, sampled].max()), abs=1e-5)
    assert 1e-5 < found.error < 0.2
    assert deviation.quantile(0.95) < found.error
    assert deviation.max() < 5 * found.error
    assert (found.kl[-1] == 0).all()
    assert (found.kl >= 0).all()
    assert (found.top1 == -1).all()


MEMORY = """
import resource, torch
torch.set_num_threads(1)
from engram_interp.kernels.lens_kl import lens_kl
generator = torch.Generator().manual_seed(0)
head = torch.randn(8192, 256, generator=generator) / 8
sites = torch.randn(13, 2048, 256, generator=generator)
targets = torch.randint(0, 8192, (2048,), generator=generator)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
lens_kl(sites[:2, :32], sites[-1, :32], head, targets[:32])
before = peak()
found = lens_kl(sites, sites[-1], head, targets)
print("ERROR", found.error, "PEAK", peak() - before)
"""


def test_memory_of_the_exact_lens_above_its_inputs():
    run = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    error, peak = map(float, run.stdout.replace("ERROR", "").split("PEAK"))
    assert peak < 150
    assert error <= 1e-5


def test_lens_names_what_is_not_finite():
    head, final = head_and_hidden(2, 9, 16, 90)
    sites = sites_near(final, 3)
    sites[1, 6, 0] = math.nan
    with pytest.raises(LensError, match="kl at site 1, token 6 is nan"):
        lens_kl(sites, final, head, targets_of(9, 90))


# -- choice ------------------------------------------------------------------------------------------------------------


def test_choice_follows_the_machine(monkeypatch):
    assert choose_path(CPU).path == "exact"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert choose_path(CPU, "fast").path == "flash"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert choose_path(CPU, "fast").path == "bfloat16"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    refused = choose_path(CPU, "fast")
    assert (refused.path, "no bfloat16" in refused.reason) == ("exact", True)
    cuda = torch.device("cuda")
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    assert choose_path(cuda).path == choose_path(cuda, "triton").path == "triton"
    assert choose_path(cuda, "fast").path == "triton_bfloat16"
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert choose_path(cuda).path == choose_path(cuda, "fast").path == "exact"


@pytest.mark.usefixtures("unchecked_shapes")
def test_impossible_choices_are_refused():
    with pytest.raises(ValueError, match="auto, exact, fast or triton, found 'quick'"):
        choose_path(CPU, "quick")
    with pytest.raises(ValueError, match="CUDA device and the package triton"):
        choose_path(CPU, "triton")
    with pytest.raises(ValueError, match="path 'exact' for top-1"):
        choose_path(CPU, "fast", top1=True)


def test_plain_head_is_found_where_the_unembedding_is_one():
    head, _ = head_and_hidden(4, 1, 16, 90)
    model, bias = SimpleNamespace(W_U=head.T), torch.randn(90)
    assert plain_head(model, lambda h: h @ head.T).equal(head)
    assert plain_head(model, lambda h: h @ head.T + bias) is None
    assert plain_head(model, lambda h: 30 * torch.tanh(h @ head.T / 30)) is None
    assert plain_head(object(), lambda h: h @ head.T) is None


def test_the_error_of_the_final_site_alone_is_nothing():
    generator = torch.Generator().manual_seed(0)
    final, head = torch.randn(5, 8, generator=generator), torch.randn(30, 8, generator=generator)
    assert sampled_error(torch.zeros(1, 5, dtype=torch.float64), final[None], final, head) == 0
