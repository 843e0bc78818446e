"""Do the cost formulas say what torch counts and what the tensors hold, at three sizes, and does the page say what they say?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from engram_interp import ablate
from engram_interp.kernels.cka import CKAGrid
from engram_interp.kernels.lens import lens_readings
from engram_interp.kernels.lens_kl import SMALL, lens_kl
from engram_interp.memory import CompressedVocabulary
from engram_interp.models import experts
from engram_interp.models.config import ModelConfig
from engram_interp.models.house import HouseModel, initialise
from engram_interp.studies import scaling
from engram_interp.studies.scaling import ModelShape
from tests.test_cost import plain_experts

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
SIZES = {
    "small": {"width": 16, "layers": 2, "streams": 1, "vocab_size": 90, "context": 20},
    "middle": {"width": 32, "layers": 4, "streams": 2, "vocab_size": 300, "context": 48},
    "large": {"width": 96, "layers": 6, "streams": 4, "vocab_size": 1100, "context": 64},
}


@pytest.fixture(params=SIZES)
def model(request, monkeypatch) -> HouseModel:
    size = SIZES[request.param]
    engram = {
        "blocks": (0, 1), "rows_per_head": (50, 50), "heads": 4, "head_width": size["width"] // 8,
        "compressed_vocab_size": size["vocab_size"], "biases": size["streams"] == 2,
    }  # fmt: skip
    rest = {
        "name": request.param,
        "heads": 2,
        "routed_experts": 4,
        "active_experts": 2,
        "expert_width": 12,
        "shared_width": 20,
    }
    config = ModelConfig.model_validate({**size, **rest, "engram": engram})
    model = HouseModel(config, CompressedVocabulary.identity(config.vocab_size))
    initialise(model, torch.Generator().manual_seed(0), table_std=1.0).eval().requires_grad_(False)
    monkeypatch.setattr(experts, "routed_swiglu", plain_experts)  # one counted product per expert
    return model


@pytest.fixture
def tokens(model: HouseModel) -> torch.Tensor:
    return torch.randint(3, model.vocab_size, (3, model.context), generator=torch.Generator().manual_seed(1))


def counted(run) -> tuple[int, object]:
    """FLOPs of matrix products, those written in place included."""
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, *_, out_shape=None, **__: addmm_flop(out, a, b)}
    with (
        FlopCounterMode(display=False, custom_mapping=in_place) as counter,
        sdpa_kernel(SDPBackend.MATH),
        torch.no_grad(),
    ):
        result = run()
    return counter.get_total_flops(), result


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.nelement() * tensor.element_size() for tensor in tensors)


def exits(model: HouseModel, tokens: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    residuals = model.residuals(tokens)
    return residuals, torch.stack([model.exit_hidden(site).flatten(0, 1) for site in residuals])


def test_parameters_are_split_into_table_and_backbone(model):
    shape = ModelShape.of(model.cfg)
    tables = [model.engram(block).table.weight for block in model.engram_layers]
    assert shape.rows * shape.row_bytes == nbytes(*tables)
    assert shape.backbone == sum(p.numel() for p in model.parameters()) - sum(t.numel() for t in tables)


def test_memory_read(model, tokens):
    cost = scaling.memory_read(ModelShape.of(model.cfg))

    def run():
        rows = []
        for engram in map(model.engram, model.engram_layers):
            rows.append(engram.read(engram.ngram_hash.slots(tokens)))
            engram.key_proj(rows[-1])
            engram.value_proj(rows[-1])
        return rows

    flops, rows = counted(run)
    assert flops == tokens.numel() * cost.flops
    assert nbytes(*rows) == tokens.numel() * cost.bytes


def test_gates(model, tokens):
    shape = ModelShape.of(model.cfg)
    names = [
        f"blocks.{block}.{hook}"
        for block in model.engram_layers
        for hook in ("engram.hook_gate", "engram.hook_score", "hook_engram_out", "hook_resid_pre")
    ]
    flops, (logits, cache) = counted(lambda: model.run_with_cache(tokens, names))
    assert flops == tokens.numel() * scaling.gates(shape).total(shape)
    assert nbytes(logits, *(cache[name] for name in names)) == tokens.numel() * scaling.gates(shape).bytes


def test_lens(model, tokens):
    shape, n = ModelShape.of(model.cfg), tokens.numel()
    targets = tokens.flatten()
    flops, (residuals, sites) = counted(lambda: exits(model, tokens))
    assert flops == n * shape.forward
    assert nbytes(*residuals, sites) == n * scaling.lens(shape).bytes == n * scaling.lens_all(shape).bytes
    # Vectors that predict different things: no KL is small enough to be formed twice.
    sites = torch.randn(sites.shape, generator=torch.Generator().manual_seed(2)) * 50 / model.width**0.5
    more, read = counted(lambda: lens_kl(sites, sites[-1], model.W_U.T, targets, top1=True))
    assert float(read.kl[:-1].min()) > SMALL
    assert flops + more == pytest.approx(n * scaling.lens(shape, n).total(shape), rel=1e-12)
    more, _ = counted(lambda: lens_readings(sites, sites[-1], model.unembed, targets))
    assert flops + more == n * scaling.lens_all(shape).total(shape)


def test_cka(model, tokens):
    shape, n = ModelShape.of(model.cfg), tokens.numel()

    def run():
        grid = CKAGrid([model.width] * shape.sites, [model.width] * shape.sites)
        sides = [[model.reduce_streams(site).flatten(0, 1) for site in model.residuals(tokens)] for _ in range(2)]
        return sides, grid.update(*sides)

    flops, (sides, grid) = counted(run)
    cost = scaling.cka(shape)
    assert flops == n * cost.total(shape)
    assert nbytes(*sides[0], *sides[1]) == n * cost.bytes
    state = {name: value for name, value in grid.state().items() if name not in ("n", "shift_a", "shift_b")}
    assert nbytes(*state.values()) == cost.fixed


def test_ablation(model, tokens):
    shape = ModelShape.of(model.cfg)

    def run():
        model(tokens)
        with ablate(model, "output_zero"):
            return model(tokens)

    flops, logits = counted(run)
    assert flops == tokens.numel() * scaling.ablation(shape).total(shape)
    assert nbytes(logits) == tokens.numel() * scaling.ablation(shape).bytes


def test_corpus_forwards_are_those_of_its_windows(model):
    from engram_interp.models.text import windows_of_ids

    shape = ModelShape.of(model.cfg)
    windows = list(windows_of_ids([5] * 20_000, [0], model.context))
    forwards = sum(window.tokens.shape[1] for window in windows) / 20_000
    assert forwards == pytest.approx(scaling.corpus(shape).forwards, rel=0.01)
    assert scaling.corpus(shape).flops == scaling.lens(shape).flops


def test_the_page_says_what_the_formulas_say():
    page = PAGE.read_text(encoding="utf-8")
    assert scaling.rewritten(page) == page, "run: python -m engram_interp.studies.scaling docs/scaling.md"
    with pytest.raises(ValueError, match="expected a page with one"):
        scaling.rewritten("no marks")
    for shape in scaling.known_shapes()[2:]:  # sizes published by their makers: 95.4 and 189.1 GiB with the projections
        assert shape.rows * shape.row_bytes / 2**30 == pytest.approx({48: 95.4, 40: 189.1}[shape.layers], rel=0.002)
