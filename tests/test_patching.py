"""Does patching move what it should between prompts, and nothing when a prompt is patched with itself?"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engram_interp.hooks import ablate
from engram_interp.hooks.site import Site
from engram_interp.probes.credit import gate_credit, rank_correlation
from engram_interp.probes.patching import (
    ALL,
    STAGES,
    PromptPair,
    patch_memory,
    path_patch_gate,
    prompt_pair,
    stage_hook,
    transplant,
)
from engram_interp.probes.slot_ablation import WHOLE, slot_effects

CLEAN, CORRUPTED = "The Prince of Wales lives in", "The Prince of London lives in"  # equally many tokens
EVEN = [(i, i) for i in (1, 4, 5, 8)]  # a shared prefix, the entity, what follows
ANSWERS = (" London", " Paris")


@pytest.mark.parametrize("stage", STAGES)
def test_patching_with_itself_changes_no_bit(tiny_engram, stage):
    tokens = tiny_engram.to_tokens(CLEAN)
    before = tiny_engram(tokens)
    for block in tiny_engram.engram_layers:
        name = stage_hook(Site(tiny_engram, block), stage)
        _, cache = tiny_engram.run_with_cache(tokens, name)
        with tiny_engram.hooks([(name, transplant(cache[name], [(i, i) for i in range(tokens.shape[1])]))]):
            assert torch.equal(tiny_engram(tokens), before)
    effects = patch_memory(tiny_engram, CLEAN, CLEAN, ANSWERS, what=[stage])
    assert (effects.rows["effect"] == 0).all() and effects.rows["closed"].isna().all()


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_stages_nest_as_the_module_computes_them(tiny_engram, direction):
    rows = patch_memory(tiny_engram, CLEAN, CORRUPTED, ANSWERS, what=STAGES, direction=direction, positions=EVEN).rows
    everywhere = rows[(rows["position"] == ALL) & (rows["block"] == 1)].set_index("stage")["effect"]
    assert everywhere["slots"] == pytest.approx(everywhere["embedding"], abs=1e-5)
    assert everywhere["key"] != 0 and everywhere["value"] != 0
    assert everywhere["score"] == pytest.approx(everywhere["gate"], abs=1e-5)
    assert everywhere["write"] != pytest.approx(everywhere["conv"], abs=1e-5)
    shared_prefix = rows[(rows["position"] == 1) & (rows["stage"] == "slots")]
    assert (shared_prefix["effect"] == 0).all()  # the prompts start alike


def test_denoising_and_noising_swap_base_and_source(tiny_engram):
    denoise = patch_memory(tiny_engram, CLEAN, CORRUPTED, ANSWERS, what=["write"])
    noise = patch_memory(tiny_engram, CLEAN, CORRUPTED, ANSWERS, what=["write"], direction="noise")
    assert denoise.base_gap == noise.source_gap and denoise.source_gap == noise.base_gap
    every = denoise.rows[(denoise.rows["position"] == ALL) & (denoise.rows["block"] == ALL)].iloc[0]
    gap = denoise.source_gap - denoise.base_gap
    assert every["closed"] == pytest.approx((every["gap"] - denoise.base_gap) / gap)


def test_positions_are_aligned_from_the_end_and_checked(tiny_engram):
    longer = "By the way, " + CORRUPTED
    pair = prompt_pair(tiny_engram, CLEAN, longer, ANSWERS)
    assert pair.positions[-1] == (pair.clean.shape[1] - 1, pair.corrupted.shape[1] - 1)
    assert 0 not in [a for a, _ in pair.positions]
    with pytest.raises(ValueError, match="differ in their first token"):
        prompt_pair(tiny_engram, CLEAN, CORRUPTED, (" London", " London"))
    with pytest.raises(ValueError, match="expected positions in"):
        prompt_pair(tiny_engram, CLEAN, CORRUPTED, ANSWERS, [(0, 99)])
    with pytest.raises(ValueError, match="unknown stage 'weights'"):
        patch_memory(tiny_engram, CLEAN, CORRUPTED, ANSWERS, what=["weights"])
    with pytest.raises(ValueError, match="denoise"):
        patch_memory(tiny_engram, CLEAN, CORRUPTED, ANSWERS, direction="both")
    with pytest.raises(ValueError, match="blocks with a memory"):
        patch_memory(tiny_engram, CLEAN, CORRUPTED, ANSWERS, blocks=[0])


def test_positions_are_turned_round_with_the_prompts():
    clean, corrupted = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)
    pair = PromptPair(clean, corrupted, (0, 1), ((0, 0), (2, 3)))
    assert pair.sides("noise") == (clean, corrupted, [(0, 0), (2, 3)])
    assert pair.sides("denoise") == (corrupted, clean, [(0, 0), (3, 2)])


def test_a_direct_path_is_the_change_of_the_write_through_the_exit(tiny_engram):
    """With everything later frozen, the residual's mean over streams changes by exactly the change of the write."""
    effects = path_patch_gate(tiny_engram, CLEAN, CORRUPTED, ANSWERS)
    pair = prompt_pair(tiny_engram, CLEAN, CORRUPTED, ANSWERS)
    base, source, places = pair.sides("denoise")
    for block in tiny_engram.engram_layers:
        gate, write = f"blocks.{block}.engram.hook_gate", f"blocks.{block}.hook_engram_out"
        _, of_source = tiny_engram.run_with_cache(source, gate)
        _, before = tiny_engram.run_with_cache(base, write)
        with tiny_engram.hooks([(gate, transplant(of_source[gate], places))]):
            _, after = tiny_engram.run_with_cache(base, write)
        change = (after[write] - before[write]).mean(2, keepdim=True)
        last = tiny_engram.logits(tiny_engram.residuals(base)[-1] + change)[0, -1]
        expected = float(last[pair.answers[0]] - last[pair.answers[1]]) - effects.base_gap
        row = effects.rows.query("block == @block and cause == 'gate'").iloc[0]
        assert row["direct"] == pytest.approx(expected, abs=1e-4)
        assert row["total"] == pytest.approx(row["direct"] + row["through_later"])
    assert set(effects.rows["cause"]) == {"gate", "key", "query"}


def test_slot_effects_equal_the_slots_ablation(tiny_engram):
    result = slot_effects(tiny_engram, CLEAN, " London", positions=[3, 4])
    tokens = tiny_engram.to_tokens(CLEAN)
    target = tiny_engram.tokenizer.encode(" London").ids[0]
    full = tiny_engram(tokens)[0, -1].log_softmax(-1)[target]
    assert result.logprob == pytest.approx(float(full), abs=1e-5)
    mask = torch.arange(tokens.shape[1]) == 4
    for wanted, head_wanted, slots in ((2, 1, [1]), (3, 2, [6]), (3, WHOLE, [4, 5, 6, 7])):
        with ablate(tiny_engram, "slots", blocks=[3], positions=mask, slots=slots):
            changed = tiny_engram(tokens)[0, -1].log_softmax(-1)[target]
        rows = result.rows.set_index(["block", "position", "order", "head"])
        row = rows.loc[(3, 4, wanted, head_wanted)]
        assert row["change_logprob"] == pytest.approx(float(changed - full), abs=1e-5)
    assert len(result.rows) == 2 * 2 * (8 + 2)
    assert result.figure().data[0].z.shape == (4, 2)


def test_gate_credit_measures_single_positions(tiny_engram, texts):
    credit = gate_credit(tiny_engram, texts[:6], per_text=4, blocks=[3])
    row = credit.positions.iloc[5]
    tokens = tiny_engram.to_tokens(texts[int(row["text"])])
    place = int(row["position"])
    with ablate(tiny_engram, "output_zero", blocks=[3], positions=torch.arange(tokens.shape[1]) == place):
        without = tiny_engram(tokens)[0, place].log_softmax(-1)
    full = tiny_engram(tokens)[0, place].log_softmax(-1)
    assert row["kl"] == pytest.approx(float((full.exp() * (full - without)).sum()), abs=1e-5)
    table = credit.table()
    assert table["measure"].tolist() == [
        "gate_mean",
        "gate_branch_0",
        "gate_branch_1",
        "gated_value_norm",
        "write_norm",
    ]
    assert ((table["rho_low"] <= table["rho"]) & (table["rho"] <= table["rho_high"])).all()


def test_rank_correlation_finds_order_and_refuses_constants():
    x = np.arange(40.0)
    groups = np.repeat(np.arange(10), 4)
    assert rank_correlation(x, x**3, groups, np.random.default_rng(0)).low == pytest.approx(1.0)
    noise = np.random.default_rng(1).normal(size=(2, 400))
    rho = rank_correlation(noise[0], noise[1], np.arange(400), np.random.default_rng(0))
    assert rho.low < 0 < rho.high
    r = np.corrcoef(noise[0].argsort().argsort(), noise[1].argsort().argsort())[0, 1]
    wide = 1.96 * (1 - r**2) / np.sqrt(len(noise[0]) - 1)  # of a rank correlation near 0
    assert (rho.high - rho.low) / 2 == pytest.approx(wide, rel=0.1)
    assert not rank_correlation(x, x * 0, groups, np.random.default_rng(0)).estimable


def test_patch_figure_and_json(tiny_engram):
    effects = patch_memory(tiny_engram, CLEAN, CORRUPTED, ANSWERS, what=["value", "gate"])
    assert effects.figure().data[0].z.shape == (4, len(effects.tokens) - 1)
    assert len(effects.as_dict()["rows"]) == len(effects.table())
