"""What is timed beside what: groups of candidates on the same inputs, the first of each group being the unit.

forward    a 12-block model of width 256 on 8 texts of 256 tokens: captures, hooks and lenses beside the plain forward
vocabulary KL of 13 sites over a large vocabulary beside stacking all logits
cka        the grid of 12 by 12 layers beside the bare matrix products of its chunks
ngram      addresses and rows of 16 heads beside the plain torch version, at the bundled and at the 27B table's shape

Programs of others: `engram_interp.studies.bench_peers`. A target is the largest ratio that the project accepts: "at least
2.5 times faster than the unit" is a target of 0.4. Models and vectors are random: a product costs the same whatever it
multiplies. Misleads: the 27B table is cut to `_TABLE_BYTES`, so that it fits beside other work; its rows still lie far
outside every cache. CKA is timed over 16,384 rows, which costs per row what 100,000 do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformer_lens.hook_points import HookPoint

from engram_interp.kernels.cka import CKAGrid
from engram_interp.kernels.lens import lens_readings
from engram_interp.kernels.lens_kl import LensPath, choose_path, lens_kl
from engram_interp.memory import CompressedVocabulary, NgramHash, assign_primes, pcg64_multipliers
from engram_interp.memory.table import gather_rows
from engram_interp.models.config import ModelConfig
from engram_interp.models.house import HouseModel, initialise
from engram_interp.shapes import Tensor


@dataclass(frozen=True)
class Candidate:
    """One row of the table.

    `run` None: nothing to time, and `note` says why. `target`: largest accepted ratio to the group's unit. `times`: how
    often `run` makes up the whole work, for what is too slow to run whole.
    """

    name: str
    run: Callable[[], object] | None
    target: float | None = None
    times: int = 1
    note: str = ""


Candidates = list[Candidate]

_RESIDUALS = "blocks.*.hook_resid_post"
_TABLE_BYTES = 2**30
_CKA_CHUNK = 4096


def bench_model(generator: torch.Generator, vocab_size: int = 8192) -> HouseModel:
    """The random 12-block model of width 256 that the ratios of the README are quoted for."""
    engram = {"blocks": (1, 6), "rows_per_head": (16384, 16384), "head_width": 16, "compressed_vocab_size": vocab_size}
    config = ModelConfig.model_validate(
        {
            "name": "bench-12x256", "vocab_size": vocab_size, "context": 256, "width": 256, "layers": 12, "heads": 4,
            "routed_experts": 4, "active_experts": 1, "expert_width": 512, "shared_width": 512, "engram": engram,
        }
    )  # fmt: skip
    model = HouseModel(config, CompressedVocabulary.identity(vocab_size))
    return initialise(model, generator).eval().requires_grad_(False)


def forward_candidates(model: HouseModel, generator: torch.Generator, *, batch: int = 8) -> Candidates:
    """Captures and lenses of a model on random tokens of a full context."""
    tokens = torch.randint(3, model.vocab_size, (batch, model.context), generator=generator)
    targets = tokens.roll(-1, 1).flatten()
    without = _without_hook_points(model)
    head = model.W_U.T

    def sites() -> Tensor:
        return torch.stack([model.exit_hidden(h).flatten(0, 1) for h in model.residuals(tokens)])

    def lens(path: LensPath) -> object:
        found = sites()
        return lens_kl(found, found[-1], head, targets, path=path)

    def every_quantity() -> object:
        found = sites()
        return lens_readings(found, found[-1], model.unembed, targets)

    return [
        Candidate("forward without any hook point", lambda: without(tokens)),
        Candidate("forward without any hook point, again (noise)", lambda: without(tokens)),
        Candidate("forward, hook points idle", lambda: model(tokens), 1.02),
        Candidate("all residuals captured", lambda: model.run_with_cache(tokens, _RESIDUALS), 1.05),
        Candidate("everything captured", lambda: model.run_with_cache(tokens)),
        Candidate("lens: KL, exact", partial(lens, "exact"), 3.0),
        Candidate(f"lens: KL, fast ({_fast()})", partial(lens, "fast"), 2.0),
        Candidate("lens: all quantities", every_quantity),
        Candidate("lens: logits of all sites stacked", lambda: stacked_kl(sites(), head)),
        Candidate("lens: TransformerLens recipe", lambda: _recipe(model, tokens)),
        Candidate("lens: bare products", lambda: _products(sites(), head)),
    ]


def _fast() -> str:
    return choose_path(torch.device("cpu"), "fast").path


def _without_hook_points(model: HouseModel) -> HouseModel:
    """A copy that calls nothing where the model calls an idle hook point; the weights are shared."""
    shared = {id(p): p for p in model.parameters()}
    bare = copy.deepcopy(model, shared)  # type: ignore[arg-type]
    for module in bare.modules():
        for name in [name for name, child in module.named_children() if isinstance(child, HookPoint)]:
            del module._modules[name]
            module.__dict__[name] = _identity
    return bare


def _identity(value: Tensor) -> Tensor:
    return value


def _recipe(model: HouseModel, tokens: Tensor) -> Tensor:
    """The logit lens as TransformerLens documents it: `accumulated_resid`, final norm, `W_U`, then KL."""
    _, cache = model.run_with_cache(tokens, ["blocks.*.hook_resid_pre", _RESIDUALS])
    hidden = model.ln_final(cache.accumulated_resid().flatten(1, 2))
    log_q = (hidden @ model.W_U).log_softmax(-1)
    return (log_q[-1].exp() * (log_q[-1] - log_q)).sum(-1)


def stacked_kl(sites: Tensor, head: Tensor) -> Tensor:
    """The obvious lens: log-probabilities of every site in memory, then KL."""
    log_q = (sites @ head.T).log_softmax(-1)
    log_p = log_q[-1]
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _products(sites: Tensor, head: Tensor, rows: int = 512, columns: int = 512) -> None:
    """Only the multiplications that a lens cannot avoid, in the dtype given: a product per site, and one for the mean."""
    tile = sites.new_empty(rows, columns)
    for hidden in (*sites, sites[-1]):
        for block in hidden.split(rows):
            for start in range(0, len(head), columns):
                part = head[start : start + columns]
                torch.mm(block, part.T, out=tile[: len(block), : len(part)])


def vocabulary_candidates(
    generator: torch.Generator, *, vocab_size: int = 49152, sites: int = 13, tokens: int = 256, width: int = 256
) -> Candidates:
    """KL over a large vocabulary; 256 tokens, because all logits of more would not fit beside other work."""
    head = torch.randn(vocab_size, width, generator=generator) / width**0.5 * 4
    hidden = torch.randn(sites, tokens, width, generator=generator)
    targets = torch.randint(0, vocab_size, (tokens,), generator=generator)
    final = hidden[-1]
    rounded, rounded_head = hidden.bfloat16(), head.bfloat16()
    fast = f"KL, fast ({_fast()})"
    return [
        Candidate("logits of all sites stacked", lambda: stacked_kl(hidden, head)),
        Candidate("KL, exact", lambda: lens_kl(hidden, final, head, targets, path="exact"), 1 / 2.5),
        Candidate(fast, lambda: lens_kl(hidden, final, head, targets, path="fast"), 1 / 9),
        Candidate("bare products", lambda: _products(hidden, head)),
        Candidate("bare products, bfloat16", lambda: _products(rounded, rounded_head, columns=1024)),
    ]


def cka_candidates(generator: torch.Generator, *, rows: int = 16384, layers: int = 12, width: int = 256) -> Candidates:
    """The grid over `rows` rows; one chunk is used again and again, so that no more lies in memory."""
    n = min(rows, _CKA_CHUNK)
    a, b = ([torch.randn(n, width, generator=generator) for _ in range(layers)] for _ in range(2))
    joined_a, joined_b = torch.cat(a, 1), torch.cat(b, 1)

    def products() -> None:
        for _ in range(rows // n):
            torch.mm(joined_a.T, joined_b)
            for x in (*a, *b):
                torch.mm(x.T, x)

    def grid() -> CKAGrid:
        found = CKAGrid([width] * layers, [width] * layers)
        for _ in range(rows // n):
            found.update(a, b)
        return found

    return [Candidate("bare products", products), Candidate("grid of all pairs", grid, 1.3)]


def ngram_candidates(
    generator: torch.Generator, *, rows_per_head: int, head_width: int, vocab_size: int, tokens: int = 2048
) -> Candidates:
    """Addresses and rows of 2 orders by 8 heads, 8 texts; a table beyond `_TABLE_BYTES` is cut."""
    rows = min(rows_per_head, _TABLE_BYTES // (16 * head_width * 4))
    primes = assign_primes((rows, rows), 8, 1)[0]
    multipliers = pcg64_multipliers(0, 1, vocab_size, 3)
    ngram_hash = NgramHash(CompressedVocabulary.identity(vocab_size), multipliers, primes, pad=2)
    table = torch.randn(ngram_hash.rows, head_width, generator=generator)
    ids = torch.randint(3, vocab_size, (8, tokens), generator=generator)

    # The formula as it is published, apart from the library's, which gets faster: the unit must not.
    moduli, offsets = torch.tensor(primes), torch.tensor(ngram_hash.offsets)

    def plain() -> Tensor:
        slots = (ngram_hash.mix(ngram_hash.compress(ids)).unsqueeze(-1) % moduli).flatten(-2)
        return torch.nn.functional.embedding(slots + offsets, table)

    def library(out: Tensor | None = None) -> Tensor:
        return gather_rows(table, ngram_hash.addressed_rows(ids), out)

    kept = library()
    return [
        Candidate("plain torch", plain),
        Candidate("hash and gather", library, 1 / 2),
        Candidate("hash and gather, output used again", lambda: library(kept), 1 / 2),
    ]
