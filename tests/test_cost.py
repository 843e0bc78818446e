"""Parameters and work per token: arithmetic against built models, bundled configurations against each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engram_interp.memory import CompressedVocabulary
from engram_interp.models import experts
from engram_interp.models.config import EngramConfig, ModelConfig
from engram_interp.models.cost import active_flops, active_parameters, memory_parameters, parameter_count
from engram_interp.models.house import HouseModel, initialise
from engram_interp.models.paper_scale import PAPER_MODELS, build_on_meta
from engram_interp.training.config import load_train_config

CONFIGS = Path(__file__).resolve().parents[1] / "experiments" / "configs" / "mini"


def config(
    streams: int = 2,
    *,
    memory: bool = True,
    biases: bool = False,
    kernel: int = 4,
    fusion: str = "branches",
    **more: object,
) -> ModelConfig:
    engram = EngramConfig(
        blocks=(2, 0),
        rows_per_head=(31, 40, 50),
        heads=2,
        head_width=3,
        compressed_vocab_size=40,
        biases=biases,
        conv_kernel=kernel,
        fusion=fusion,
    )
    return ModelConfig(
        name="small",
        vocab_size=40,
        context=20,
        width=16,
        layers=3,
        heads=2,
        streams=streams,
        routed_experts=5,
        active_experts=2,
        expert_width=6,
        shared_width=10,
        engram=engram if memory else None,
        **more,
    )


def build(settings: ModelConfig) -> HouseModel:
    model = HouseModel(settings, CompressedVocabulary.identity(40))
    return initialise(model, torch.Generator().manual_seed(0)).requires_grad_(False)


@pytest.mark.parametrize("settings", [
    config(),
    config(1),
    config(4, biases=True),
    config(2, kernel=0),
    config(1, memory=False),
    config(3, memory=False),
    config(2, fusion="mean"),
    config(2, dense_blocks=1, dense_width=11, tied=False),
    config(1, memory=False, dense_blocks=3, dense_width=11),
])  # fmt: skip
def test_parameters_are_those_of_the_built_model(settings: ModelConfig) -> None:
    model = build(settings)
    assert parameter_count(settings) == sum(p.numel() for p in model.parameters())
    found = sum(p.numel() for name, p in model.named_parameters() if ".engram." in name)
    assert memory_parameters(settings) == found


def plain_experts(x, indices, weights, w_in, w_out):
    """The routed experts with one counted product per expert in use."""
    out = torch.zeros_like(x)
    for expert in range(len(w_in)):
        rows, slot = (indices == expert).nonzero(as_tuple=True)
        gate, up = (x[rows] @ w_in[expert]).chunk(2, -1)
        out.index_add_(0, rows, (torch.nn.functional.silu(gate) * up) @ w_out[expert] * weights[rows, slot, None])
    return out


@pytest.mark.parametrize(
    "settings",
    [
        config(),
        config(4),
        config(1, memory=False),
        config(2, fusion="mean"),
        config(dense_blocks=2, dense_width=9, tied=False),
    ],
)
def test_flops_are_those_that_torch_counts(settings: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(settings)
    tokens = torch.randint(3, 40, (3, settings.context), generator=torch.Generator().manual_seed(1))
    expected = model(tokens)
    monkeypatch.setattr(experts, "routed_swiglu", plain_experts)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits = model(tokens)
    torch.testing.assert_close(logits, expected)  # what was counted is what the model computes
    assert counter.get_total_flops() == tokens.numel() * active_flops(settings).total


def test_the_bundled_models_are_an_equal_pair() -> None:
    engram, moe, control = (
        load_train_config(CONFIGS / f"{name}.yaml") for name in ("mini-engram", "mini-moe", "mini-moe-control")
    )
    sizes = [parameter_count(run.model) for run in (engram, moe, control)]
    assert max(sizes) / min(sizes) < 1.01, sizes
    work = [active_flops(run.model) for run in (engram, moe, control)]
    assert work[0].backbone == work[1].backbone == work[2].backbone
    assert (work[1].memory, work[2].memory) == (0, 0)
    assert abs(work[0].total / work[1].total - 1) < 0.05, "memory read and router together must stay small"
    assert control.model.model_copy(update={"name": moe.model.name}) == moe.model
    changed = {"out", "seed", "model"}
    assert moe.model_dump(exclude=changed) == control.model_dump(exclude=changed) == engram.model_dump(exclude=changed)
    assert moe.seed == engram.seed != control.seed
    assert moe.model.model_copy(update={"name": "", "routed_experts": 0}) == engram.model.model_copy(
        update={"name": "", "routed_experts": 0, "engram": None}
    )
    memory = engram.model.engram
    assert memory is not None
    assert min(memory.rows_per_head) >= 2 * memory.compressed_vocab_size


def test_active_parameters_leave_out_what_a_token_does_not_use() -> None:
    plain = config(1, memory=False)
    idle = (plain.routed_experts - plain.active_experts) * 3 * plain.width * plain.expert_width
    assert active_parameters(plain) == parameter_count(plain) - plain.layers * idle
    untied = config(1, memory=False, tied=False)
    assert active_parameters(untied) == active_parameters(plain)
    rows = config(1)
    wider = rows.model_copy(update={"engram": rows.engram.model_copy(update={"rows_per_head": (310, 400, 500)})})
    assert active_parameters(wider) == active_parameters(rows)


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_models_of_the_papers_size_have_its_parameters(name: str) -> None:
    paper = PAPER_MODELS[name]
    model = build_on_meta(paper.config)
    counted = sum(p.numel() for p in model.parameters())
    assert all(p.is_meta for p in model.parameters())
    assert counted == parameter_count(paper.config)
    assert counted / 1e9 == pytest.approx(paper.total, rel=0.02)
    assert active_parameters(paper.config) / 1e9 == pytest.approx(paper.active, rel=0.06)  # latent attention is smaller
    assert memory_parameters(paper.config) / 1e9 == pytest.approx(paper.engram, rel=0.025)  # printed with two digits
