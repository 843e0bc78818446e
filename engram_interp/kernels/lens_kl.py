"""KL(final || site) of every residual site, at little more than one product with the unembedding per site.

For an unembedding W without bias or soft cap, and mean_F = sum_v p_F(v) w_v of the final prediction,

    KL(F || l) = (h_F - h_l) . mean_F - log_z_F + log_z_l        cross-entropy_l(y) = log_z_l - h_l . w_y

so that a site costs its log-partition alone (`engram_interp.kernels.partition`). The differences are taken in float64;
where they leave less than `SMALL` nats the value is formed again by `engram_interp.kernels.delta`, which cancels nothing.
A head that is not a plain matrix takes the direct path of `engram_interp.kernels.lens`.

Paths: "exact" float32 tiles, "fast" bfloat16 products (which kind depends on the machine, `choose_path`), "triton" the
same as exact on CUDA; "auto" is exact on a CPU, triton on CUDA where Triton is installed. Every result states the
largest deviation from float64 (fast paths: from exact) found on a sample of its own tokens. Misleads: the fast path
moves KL by about 1e-2 nats, and everything below its stated error is noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch
from jaxtyping import Float64

from engram_interp.kernels.delta import delta_kl
from engram_interp.kernels.lens import LensError
from engram_interp.kernels.partition import (
    Partition,
    RoundedHead,
    bfloat16_partition,
    exact_partition,
    flash_partition,
)
from engram_interp.shapes import Float, Int64, Tensor

LensPath = Literal["auto", "exact", "fast", "triton"]
SMALL = 1e-3  # nats; the identity is good to about 1e-5
SAMPLE = 16  # tokens checked in each call: 2 % of the work at 2,048 tokens


@dataclass(frozen=True)
class PathChoice:
    """Which arithmetic was taken, in which words the provenance records it, and why."""

    path: Literal["exact", "bfloat16", "flash", "triton", "triton_bfloat16"]
    description: str
    reason: str


@dataclass(frozen=True, eq=False)
class LensKL:
    """Nats. `top1`, `final_top1` are -1 unless asked for; `error`: largest deviation of kl over `checked` sampled tokens."""

    kl: Float[Tensor, "L N"]
    cross_entropy: Float[Tensor, "L N"]
    top1: Int64[Tensor, "L N"]
    final_top1: Int64[Tensor, " N"]
    choice: PathChoice
    error: float
    checked: int


def choose_path(device: torch.device, path: LensPath = "auto", *, top1: bool = False) -> PathChoice:
    """The arithmetic for a device.

    Raises: ValueError for an unknown path, "triton" without CUDA or Triton, or a fast path that cannot give top-1.
    """
    if path not in ("auto", "exact", "fast", "triton"):
        raise ValueError(f"expected path auto, exact, fast or triton, found {path!r}")
    cuda = device.type == "cuda"
    if path == "triton" and not (cuda and find_spec("triton")):
        raise ValueError(f"expected a CUDA device and the package triton for path 'triton', found {device.type}")
    if path == "fast" and top1:
        raise ValueError("expected path 'exact' for top-1 predictions: bfloat16 products reorder close candidates")
    exact = PathChoice("exact", "identity, float32 tiles", f"{path} on {device.type}")
    if path == "exact" or (path == "auto" and not (cuda and find_spec("triton"))):
        return exact
    if cuda and find_spec("triton"):
        if path == "fast":
            return PathChoice("triton_bfloat16", "identity, Triton lens_tile on bfloat16 vectors", "fast on cuda")
        return PathChoice("triton", "identity, Triton lens_tile on float32 vectors", f"{path} on cuda")
    if cuda:
        return PathChoice("exact", exact.description, "fast asked for, but Triton is not installed")
    if torch.cpu._is_amx_tile_supported():
        return PathChoice("flash", "identity, bfloat16 flash attention", "fast on a CPU with AMX")
    if torch.cpu._is_avx512_bf16_supported():
        return PathChoice("bfloat16", "identity, shifted bfloat16 tiles", "fast on a CPU with AVX512-BF16")
    return PathChoice("exact", exact.description, "fast asked for, but this CPU has no bfloat16 products")


def plain_head(model: object, unembed: Callable[[Tensor], Tensor]) -> Tensor | None:
    """W [V, D] of a model whose unembedding is exactly h W', None otherwise (bias, soft cap, no `W_U`).

    Four vectors decide: a soft cap bends the two long ones, a bias shifts the zero vector.
    """
    weight = getattr(model, "W_U", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.dtype not in (torch.float32, torch.float64):
        return None
    head = weight.detach().T
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, head.shape[1], generator=generator).to(head) * head.new_tensor([[0.0], [1.0], [8.0], [64.0]])
    with torch.no_grad():
        found, expected = unembed(probe), probe @ head.T
    same = found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    return head if same else None


@torch.no_grad()
def lens_kl(
    sites: Float[Tensor, "L N D"],
    final: Float[Tensor, "N D"],
    head: Float[Tensor, "V D"],
    targets: Int64[Tensor, " N"],
    *,
    path: LensPath = "auto",
    top1: bool = False,
) -> LensKL:
    """KL to the final prediction and cross-entropy of every site.

    Args: sites, final: vectors that passed the model's exit norm; targets: true next token, -1 where there is none.
    A site whose vectors equal `final` has a KL of exactly 0; no value is negative.
    Raises: LensError naming site and token of the first value that is not finite; ValueError as `choose_path`.
    """
    choice = choose_path(final.device, path, top1=top1)
    kl, cross_entropy, predictions, last = _Engine.of(choice, head, top1).measure(sites, final, targets)
    finite = torch.isfinite(kl)
    if not bool(finite.all()):
        site, token = torch.nonzero(~finite)[0].tolist()
        raise LensError(f"kl at site {site}, token {token} is {kl[site, token].item()}")
    finer = torch.float64 if choice.path in ("exact", "triton") else torch.float32
    error = sampled_error(kl, sites, final, head, finer)
    checked = len(_sample(len(final)))
    return LensKL(kl.to(sites.dtype), cross_entropy.to(sites.dtype), predictions, last, choice, error, checked)


@torch.no_grad()
def sampled_error(
    kl: Float[Tensor, "L N"],
    sites: Float[Tensor, "L N D"],
    final: Float[Tensor, "N D"],
    head: Float[Tensor, "V D"],
    finer: torch.dtype = torch.float64,
) -> float:
    """Largest deviation of `kl` from the exact path in the dtype `finer`, nats, over a few evenly spaced tokens."""
    chosen = _sample(len(final))
    if not len(chosen):
        return 0.0
    exact = _Engine.of(PathChoice("exact", "", ""), head)
    last, hidden = final[chosen].to(finer), sites[:, chosen].to(finer)
    base = exact.final(last)
    assert base.mean is not None
    others = [i for i, site in enumerate(hidden) if not torch.equal(site, last)]
    log_z = exact.site(hidden[others].flatten(0, 1)).log_z  # few rows a site: W is read once for all
    expected = torch.zeros(hidden.shape[:2], dtype=torch.float64, device=hidden.device)
    for i, here in zip(others, log_z.view(len(others), len(last)), strict=True):
        expected[i] = exact._divergence(last, hidden[i], base, base.mean.double(), here)
    return float((kl[:, chosen] - expected).abs().max())


@dataclass(frozen=True)
class _Engine:
    """One path: the vectors as it reads them, its partition of the final vectors (with mean) and of a site's."""

    head: Tensor
    read: Callable[[Tensor], Tensor]
    final: Callable[[Tensor], Partition]
    site: Callable[[Tensor], Partition]
    delta: Callable[[Tensor, Tensor, Tensor, Partition], Tensor] | None  # for small values; None leaves them

    @classmethod
    def of(cls, choice: PathChoice, head: Tensor, top1: bool = False) -> _Engine:
        if choice.path == "bfloat16":
            rounded = RoundedHead.of(head)
            final = partial(exact_partition, head=rounded.plain, mean=True)
            return cls(rounded.plain, rounded.read, final, partial(bfloat16_partition, head=rounded), None)
        if choice.path == "flash":
            key = head.bfloat16()
            final = partial(exact_partition, head=key, mean=True)
            return cls(key, lambda h: h.bfloat16().float(), final, partial(flash_partition, head=key), None)
        partition, delta = exact_partition, delta_kl
        if choice.path.startswith("triton"):
            from engram_interp.kernels.triton_lens import triton_delta as delta
            from engram_interp.kernels.triton_lens import triton_partition as partition
        if choice.path == "triton_bfloat16":
            head = head.bfloat16()
            site = partial(partition, head=head)
            return cls(head, lambda h: h.bfloat16().float(), partial(site, mean=True), site, None)
        site = partial(partition, head=head, top1=top1)
        return cls(head, lambda h: h, partial(site, mean=True), site, delta)

    def measure(self, sites: Tensor, final: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """KL and cross-entropy in float64, top-1 (-1 where the path gives none) as [L, N], and the final top-1."""
        read = self.read(final)
        base = self.final(read)
        truth, has_truth = self.head[targets.clamp_min(0)].double(), targets >= 0
        assert base.mean is not None
        mean = base.mean.double()
        kl = torch.zeros(sites.shape[:2], dtype=torch.float64, device=sites.device)
        cross_entropy, top1 = torch.full_like(kl, math.nan), torch.full_like(kl, -1, dtype=torch.int64)
        for i, raw in enumerate(sites):
            same = torch.equal(raw, final)
            hidden = read if same else self.read(raw)
            here = base if same else self.site(hidden)
            if not same:
                kl[i] = self._divergence(read, hidden, base, mean, here.log_z)
            loss = here.log_z - torch.linalg.vecdot(hidden.double(), truth)
            cross_entropy[i] = torch.where(has_truth, loss, math.nan)
            if here.top1 is not None:
                top1[i] = here.top1
        return kl, cross_entropy, top1, torch.full_like(targets, -1) if base.top1 is None else base.top1

    def _divergence(self, final: Tensor, hidden: Tensor, base: Partition, mean: Tensor, log_z: Tensor) -> Tensor:
        assert base.mean is not None
        kl = torch.linalg.vecdot((final - hidden).double(), mean) - base.log_z + log_z
        rows = torch.nonzero(kl < SMALL).squeeze(1)
        if self.delta is not None and len(rows):
            part = Partition(base.log_z[rows], base.mean[rows])
            small = self.delta(final[rows], hidden[rows] - final[rows], self.head, part)
            kl[rows] = torch.where(torch.isfinite(small), small, kl[rows])
        return kl.clamp_min(0)  # keeps NaN


def _sample(tokens: int) -> Tensor:
    """Evenly spaced tokens, the same for every path."""
    count = min(tokens, SAMPLE)
    return torch.arange(count) * tokens // max(count, 1)


def lens_kl_reference(
    sites: Float64[Tensor, "L N D"], final: Float64[Tensor, "N D"], head: Float64[Tensor, "V D"]
) -> Float64[Tensor, "L N"]:
    """The obvious version: all logits in float64, KL by its definition."""
    log_p = (final @ head.T).log_softmax(-1)
    log_q = (sites @ head.T).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
