"""What do the programs of others cost, on the same model in the same run?

peers      KL(final || site) of a Llama of 12 blocks and width 256 on 8 texts of 256 tokens, beside its plain forward:
           this library and tuned-lens
cka peers  the grid of 12 by 12 layers beside ckatorch's pairs

Each is timed only where it is installed; a row says so where it is not, or why it does not run. nnsight 0.8 and
nnterp 1.3 did not run here beside this torch and are left out. Misleads: ckatorch compares one pair of layers at a time, so one pair
is timed and counted 144 times; its exact form needs [n, n] matrices, hence the few rows.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from engram_interp.kernels.cka import CKAGrid
from engram_interp.kernels.lens_kl import LensPath, lens_kl
from engram_interp.shapes import Tensor
from engram_interp.studies.bench_candidates import Candidate, Candidates, stacked_kl

_TEXTS, _TOKENS = 8, 256


def llama(generator: torch.Generator, *, layers: int = 12, width: int = 256, vocab_size: int = 8192) -> Any:
    """A random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=_TOKENS, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
    return model


def peer_candidates(generator: torch.Generator, model: Any = None) -> Candidates:
    """Lenses of one Llama; the unit is its forward."""
    model = model or llama(generator)
    tokens = torch.randint(3, model.config.vocab_size, (_TEXTS, _TOKENS), generator=generator)
    targets, head, norm = tokens.roll(-1, 1).flatten(), model.lm_head.weight, model.model.norm

    def vectors() -> Tensor:
        hidden = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
        return torch.stack([norm(h).flatten(0, 1) for h in hidden[:-1]] + [hidden[-1].flatten(0, 1)])

    def ours(path: LensPath) -> object:
        found = vectors()
        return lens_kl(found, found[-1], head, targets, path=path)

    return [
        Candidate("Llama, plain forward", lambda: model(tokens, use_cache=False)),
        Candidate("this library: KL, exact", lambda: ours("exact"), 3.0),
        Candidate("this library: KL, fast", lambda: ours("fast"), 2.0),
        Candidate("logits of all sites stacked", lambda: stacked_kl(vectors(), head)),
        _peer("tuned-lens: LogitLens", "tuned_lens", lambda: _tuned_lens(model, tokens)),
    ]


def _peer(name: str, package: str, make: Callable[[], Callable[[], object]], **more: Any) -> Candidate:
    if find_spec(package) is None:
        return Candidate(name, None, note=f"{package} is not installed")
    try:
        import_module(package)
        run = make()
        with torch.no_grad():
            run()
    except Exception as error:  # noqa: BLE001 - whatever somebody else's program raises is what the row says
        return Candidate(name, None, note=f"does not run: {type(error).__name__}: {error}".split("\n")[0])
    return Candidate(name, run, **more)


def _kl(final: Tensor, layer: Tensor) -> Tensor:
    log_p, log_q = final.log_softmax(-1), layer.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _tuned_lens(model: Any, tokens: Tensor) -> Callable[[], object]:
    model_surgery: Any = import_module("tuned_lens.model_surgery")
    model_surgery._transformer_lens_available = False  # it asks TransformerLens for a class that version 4 lacks
    lens = import_module("tuned_lens.nn.lenses").LogitLens.from_model(model)

    def run() -> list[Tensor]:
        found = model(tokens, output_hidden_states=True, use_cache=False)
        return [_kl(found.logits, lens(h, i)) for i, h in enumerate(found.hidden_states[:-1])]

    return run


def cka_peer_candidates(
    generator: torch.Generator, *, rows: int = 2048, layers: int = 12, width: int = 256
) -> Candidates:
    """The grid beside ckatorch: exact over all rows, and its minibatch form (256 rows a batch); both are pair by pair."""
    a, b = ([torch.randn(rows, width, generator=generator) for _ in range(layers)] for _ in range(2))
    pairs, batch = layers**2, min(256, rows)
    stacked_a, stacked_b = (x[0].view(-1, batch, width) for x in (a, b))

    def exact() -> Callable[[], object]:
        cka_base = import_module("ckatorch").cka_base
        return lambda: cka_base(a[0], b[0], unbiased=True, method="fro_norm")

    def batches() -> Callable[[], object]:
        cka_batch = import_module("ckatorch").cka_batch
        return lambda: cka_batch(stacked_a, stacked_b)

    def grid() -> object:
        return CKAGrid([width] * layers, [width] * layers).update(a, b).result()

    unit = _peer("ckatorch: cka_base, pair by pair", "ckatorch", exact, times=pairs)
    minibatch = _peer("ckatorch: cka_batch, pair by pair", "ckatorch", batches, times=pairs)
    return [unit, minibatch, Candidate("grid of all pairs", grid, 1 / 10 if unit.run else None)]
