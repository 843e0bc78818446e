"""Does every way of taking the memory away do what it says, only where it was asked, and leave nothing behind?"""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformer_lens.hook_points import HookPoint

from engram_interp.hooks import (
    KINDS,
    AblationError,
    ablate,
    collect_memory_statistics,
    controls,
    fit_optimal_constants,
    write_kinds,
)
from engram_interp.hooks.row_kinds import hash_permute, hash_reseed, quantise_rows
from engram_interp.hooks.site import Site
from engram_interp.hooks.write_kinds import random_directions
from tests.ablation_options import OPTIONS


@pytest.fixture(scope="module")
def statistics(tiny_engram, texts):
    fitted = collect_memory_statistics(tiny_engram, texts[4:], donors=64)
    return fit_optimal_constants(tiny_engram, texts[4:7], fitted, steps=3)


@pytest.fixture(scope="module")
def tokens(tiny_engram, texts):
    rows = [tiny_engram.to_tokens(text)[:, :12] for text in (texts[0], texts[2] + " " + texts[3])]
    assert all(row.shape[1] == 12 for row in rows)
    return torch.cat(rows)


def hook_count(model) -> int:
    return sum(len(point._forward_hooks) for point in model.hook_dict.values())


def run(model, tokens, kind=None, **arguments):
    if kind is None:
        return model(tokens)
    with ablate(model, kind, **arguments):
        return model(tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_changes_the_output_alike_in_any_batch_and_goes_away(kind, tiny_engram, tokens, statistics):
    arguments = OPTIONS.get(kind, {}) | {"statistics": statistics}
    before = tiny_engram(tokens)
    both = run(tiny_engram, tokens, kind, **arguments)
    single = torch.cat([run(tiny_engram, row[None], kind, **arguments) for row in tokens])
    assert (both - before).abs().amax() > 1e-4
    torch.testing.assert_close(both, single, atol=1e-4, rtol=1e-4)
    assert torch.equal(tiny_engram(tokens), before)


@pytest.mark.parametrize("kind", ["equal_norm_random", "resample", "hash_permute", "hash_reseed"])
def test_the_seed_decides_what_a_random_kind_puts_in(kind, tiny_engram, tokens, statistics):
    fitted = {"statistics": statistics} if kind == "resample" else {}
    first, again, other = (run(tiny_engram, tokens, kind, seed=seed, **fitted) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first - other).abs().amax() > 1e-4


@pytest.mark.parametrize("kind", [hash_permute, hash_reseed])
def test_two_memories_are_not_rehashed_alike(kind, tiny_engram):
    """One n-gram must not meet the same fate in both memories: as shares of their head's rows, the new slots differ."""
    places = []
    for block in tiny_engram.engram_layers:
        site = Site(tiny_engram, block)
        slots = torch.ones(1, 1, site.memory.ngram_hash.heads * 2, dtype=torch.int64)
        ((_, rehash),) = kind(site, seed=3)
        places.append(rehash(slots, HookPoint())[0, 0] / torch.tensor(site.memory.ngram_hash.sizes))
    assert (places[0] - places[1]).abs().amax() > 0.2


def test_the_bank_of_random_directions_is_the_one_of_its_seed(tiny_engram, tokens, monkeypatch):
    """With every position held at one donor, what is put in comes from the bank alone; its numbers are pinned."""
    first, again, other = (random_directions(1, 2, 32, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert first.shape == (512, 2, 32) and not torch.allclose(first[3], other[3], atol=0.1)
    assert not torch.allclose(first[3], random_directions(3, 2, 32, 0)[3], atol=0.1), "two memories draw alike"
    torch.testing.assert_close(first[0, 0, :3], torch.tensor([-0.28855, -0.14190, -0.12369]), atol=1e-4, rtol=0)
    torch.testing.assert_close(other[0, 0, :3], torch.tensor([-0.34130, -0.08644, 0.03074]), atol=1e-4, rtol=0)
    monkeypatch.setattr(write_kinds, "choose_donors", lambda slots, count, seed: torch.full(slots.shape[:2], 7))
    name = "blocks.1.hook_engram_out"
    for seed, bank in ((0, first), (1, other)):
        with ablate(tiny_engram, "equal_norm_random", seed=seed):
            _, cache = tiny_engram.run_with_cache(tokens, name)
        cosine = torch.nn.functional.cosine_similarity(cache[name], bank[7], dim=-1)
        torch.testing.assert_close(cosine, torch.ones_like(cosine))


@pytest.mark.parametrize("kind", KINDS)
def test_positions_and_blocks_limit_every_kind(kind, tiny_engram, tokens, statistics):
    arguments = OPTIONS.get(kind, {}) | {"statistics": statistics}
    mask = torch.zeros(12, dtype=torch.bool)
    mask[7:] = True
    changed = run(tiny_engram, tokens, kind, blocks=[3], positions=mask, **arguments)
    before, cache = tiny_engram.run_with_cache(tokens, "blocks.2.hook_resid_post")
    torch.testing.assert_close(changed[:, :7], before[:, :7], atol=1e-5, rtol=1e-5)
    assert (changed[:, 7:] - before[:, 7:]).abs().amax() > 1e-4
    with ablate(tiny_engram, kind, blocks=[3], **arguments):
        _, ablated = tiny_engram.run_with_cache(tokens, "blocks.2.hook_resid_post")
    assert torch.equal(cache["blocks.2.hook_resid_post"], ablated["blocks.2.hook_resid_post"])
    per_text = torch.stack([mask, torch.zeros_like(mask)])
    partly = run(tiny_engram, tokens, kind, positions=per_text, **arguments)
    torch.testing.assert_close(partly[1], before[1], atol=1e-5, rtol=1e-5)
    assert (partly[0] - before[0]).abs().amax() > 1e-4


def test_branches_limit_the_write(tiny_engram, tokens, statistics):
    name = "blocks.1.hook_engram_out"
    _, before = tiny_engram.run_with_cache(tokens, name)
    for kind in ("output_zero", "mean", "resample", "equal_norm_random", "gate_closed", "gated_off", "conv_off"):
        with ablate(tiny_engram, kind, blocks=[1], branches=[1], statistics=statistics):
            _, after = tiny_engram.run_with_cache(tokens, name)
        assert torch.equal(before[name][:, :, 0], after[name][:, :, 0]), kind
        assert not torch.equal(before[name][:, :, 1], after[name][:, :, 1]), kind


def test_a_silent_memory_a_scale_of_one_and_a_patch_with_itself_change_no_bit(fresh_engram, tiny_engram, tokens, texts):
    before = tiny_engram(tokens)
    assert torch.equal(run(tiny_engram, tokens, "gate_scale", scale=1.0), before)
    with torch.no_grad():
        for block in fresh_engram.engram_layers:
            fresh_engram.engram(block).value_proj.weight.zero_()
    silent = fresh_engram(tokens)
    own = collect_memory_statistics(fresh_engram, texts[4:7])
    own = fit_optimal_constants(fresh_engram, texts[4:7], own, steps=0)  # not trained: its start is the mean write, 0
    for kind in (name for name, kind in KINDS.items() if kind not in controls.KINDS):
        got = run(fresh_engram, tokens, kind, **OPTIONS.get(kind, {}), statistics=own)
        assert torch.equal(got, silent), kind


def test_gate_closed_is_output_zero_without_biases_and_not_with_them(tiny_engram, tokens):
    closed, zero = (run(tiny_engram, tokens, kind) for kind in ("gate_closed", "output_zero"))
    assert torch.equal(closed, zero)
    assert torch.equal(run(tiny_engram, tokens, "embedding_zero"), zero)
    biased = with_value_bias(tiny_engram)
    assert not torch.equal(run(biased, tokens, "embedding_zero"), run(biased, tokens, "output_zero"))


def with_value_bias(model):
    biased = copy.deepcopy(model)
    for block in biased.engram_layers:
        biased.engram(block).value_proj.bias = torch.nn.Parameter(torch.full((model.width,), 0.5), requires_grad=False)
    return biased


def test_hash_permutation_is_a_bijection_and_its_inverse_undoes_it(tiny_engram, tokens):
    before = tiny_engram(tokens)
    with ablate(tiny_engram, "hash_permute", seed=3):
        _, cache = tiny_engram.run_with_cache(tokens, "*.hook_slots")
        with ablate(tiny_engram, "hash_permute", seed=3, inverse=True):
            assert torch.equal(tiny_engram(tokens), before)
        with ablate(tiny_engram, "hash_permute", seed=4, inverse=True):
            assert not torch.equal(tiny_engram(tokens), before)
    _, plain = tiny_engram.run_with_cache(tokens, "*.hook_slots")
    for block in tiny_engram.engram_layers:
        name = f"blocks.{block}.engram.hook_slots"
        sizes = torch.tensor(tiny_engram.engram(block).ngram_hash.sizes)
        assert (cache[name] < sizes).all() and (cache[name] >= 0).all()
        for slot in range(len(sizes)):
            pairs = {
                (int(a), int(b))
                for a, b in torch.stack([plain[name][..., slot], cache[name][..., slot]], -1).flatten(0, 1)
            }
            assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)


def test_write_paths_add_up(tiny_engram, tokens):
    name = "blocks.1.hook_engram_out"
    writes = {}
    for kind in (None, "conv_off", "gated_off"):
        if kind is None:
            _, cache = tiny_engram.run_with_cache(tokens, name)
        else:
            with ablate(tiny_engram, kind, blocks=[1]):
                _, cache = tiny_engram.run_with_cache(tokens, name)
        writes[kind] = cache[name]
    torch.testing.assert_close(writes["conv_off"] + writes["gated_off"], writes[None])


def test_replacements_are_what_they_claim(tiny_engram, tokens, statistics, texts):
    name = "blocks.1.hook_engram_out"
    _, before = tiny_engram.run_with_cache(tokens, name)
    with ablate(tiny_engram, "equal_norm_random", seed=1):
        _, noise = tiny_engram.run_with_cache(tokens, name)
    torch.testing.assert_close(noise[name].norm(dim=-1), before[name].norm(dim=-1))
    cosine = torch.nn.functional.cosine_similarity(noise[name], before[name], dim=-1)
    assert cosine.abs().mean() < 0.35  # 32 dimensions: |cos| of random directions averages .14
    with ablate(tiny_engram, "resample", statistics=statistics):
        _, other = tiny_engram.run_with_cache(tokens, name)
    donors = statistics.blocks[1].donors
    assert all(any(torch.equal(write, donor) for donor in donors) for write in other[name].flatten(0, 1))
    rows = [tiny_engram.run_with_cache(tiny_engram.to_tokens(t), name)[1][name][0, 1:] for t in texts[4:]]
    torch.testing.assert_close(torch.cat(rows).mean(0), statistics.blocks[1].write_mean)


def test_quantised_and_pruned_reads_equal_a_changed_table(fresh_engram, tiny_engram, tokens, statistics):
    for bits in (8, 4, 3, 2):
        changed = copy.deepcopy(tiny_engram)
        for block in changed.engram_layers:
            weight = changed.engram(block).table.weight
            weight.data = quantise_rows(weight.data, bits)
            assert max(len(row.unique()) for row in weight.data) <= 2**bits - 1
        assert torch.equal(run(tiny_engram, tokens, "quantise", bits=bits), changed(tokens))
    pruned = copy.deepcopy(tiny_engram)
    for block in pruned.engram_layers:
        weight, use = pruned.engram(block).table.weight.data, statistics.blocks[block].use
        weight[use == 0] = 0.0
    share = {b: float((statistics.blocks[b].use == 0).double().mean()) for b in pruned.engram_layers}
    with ablate(tiny_engram, "prune_rows", blocks=[1], fraction=share[1], by="use", statistics=statistics):
        got = run(tiny_engram, tokens, "prune_rows", blocks=[3], fraction=share[3], by="use", statistics=statistics)
    assert torch.equal(got, pruned(tokens))


def test_quantisation_error_grows_as_bits_go(tiny_engram):
    table = tiny_engram.engram(1).table.weight
    errors = [float((quantise_rows(table, bits) - table).norm()) for bits in (8, 4, 3, 2)]
    assert errors == sorted(errors) and errors[0] < 0.01 * float(table.norm())
    assert float((quantise_rows(table, 3, block=2) - table).norm()) < errors[2]


def test_matched_controls_change_the_streams_by_the_size_of_the_write(tiny_engram, tokens, statistics):
    for kind, site in (("attn_zero", "blocks.1.hook_resid_mid"), ("mlp_zero", "blocks.1.hook_resid_post")):
        _, before = tiny_engram.run_with_cache(tokens, [site, "blocks.1.hook_engram_out"])
        with ablate(tiny_engram, kind, blocks=[1], statistics=statistics):
            _, after = tiny_engram.run_with_cache(tokens, site)
        change = (after[site] - before[site]).flatten(2).norm(dim=2)
        torch.testing.assert_close(
            change, before["blocks.1.hook_engram_out"].flatten(2).norm(dim=2), rtol=1e-3, atol=1e-4
        )


def test_the_fitted_constant_is_no_worse_than_the_mean(tiny_engram, texts, statistics):
    losses = {}
    for kind in ("mean", "optimal"):
        total = 0.0
        for text in texts[4:7]:
            row = tiny_engram.to_tokens(text)
            logits = run(tiny_engram, row, kind, statistics=statistics)
            total += float(torch.nn.functional.cross_entropy(logits[0, :-1], row[0, 1:]))
        losses[kind] = total
    assert losses["optimal"] < losses["mean"]


def test_statistics_count_every_read(tiny_engram, texts, statistics):
    hashes = [tiny_engram.engram(b).ngram_hash for b in tiny_engram.engram_layers]
    expected = torch.zeros(hashes[0].rows, dtype=torch.int64)
    for text in texts[4:]:
        row = tiny_engram.to_tokens(text)
        for read in hashes[0].rows_of_slots(hashes[0].slots(row))[0, 1:].flatten():
            expected[read] += 1
    assert torch.equal(statistics.blocks[1].use, expected)


def test_hooks_are_gone_after_any_exception_and_nesting_undoes_in_order(tiny_engram, tokens):
    before = tiny_engram(tokens)
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), ablate(tiny_engram, "output_zero"), ablate(tiny_engram, "gate_open"):
            assert hook_count(tiny_engram) == 4
            raise error
        assert hook_count(tiny_engram) == 0
    with ablate(tiny_engram, "output_zero", blocks=[1]):
        outer = tiny_engram(tokens)
        with ablate(tiny_engram, "output_zero", blocks=[3]):
            assert torch.equal(tiny_engram(tokens), run(tiny_engram, tokens, "output_zero"))
        assert torch.equal(tiny_engram(tokens), outer)
    with pytest.raises(AblationError, match="position mask"):
        run(tiny_engram, tokens, "output_zero", positions=torch.ones(5, dtype=torch.bool))
    assert hook_count(tiny_engram) == 0
    assert torch.equal(tiny_engram(tokens), before)


def test_three_threads_of_a_hundred_traces_never_mix(tiny_engram, tokens):
    row = tokens[:1, :6]
    conditions = [("output_zero", {}), ("gate_scale", {"scale": 0.5}), (None, {})]

    def trace(kind, options):
        with nullcontext() if kind is None else ablate(tiny_engram, kind, **options):
            logits, cache = tiny_engram.run_with_cache(row, ["*.hook_engram_out", "*.hook_gate"])
        return [logits, *(cache[name] for name in sorted(cache))]

    expected = [trace(*condition) for condition in conditions]
    assert len(expected[0]) == 5
    wrong: list[str] = []

    def work(index: int) -> None:
        for _ in range(100):
            found = trace(*conditions[index])
            if len(found) != 5 or not all(map(torch.equal, found, expected[index])):
                wrong.append(str(conditions[index][0]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and hook_count(tiny_engram) == 0


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("remove", {}, "unknown kind 'remove'"),
        ("output_zero", {"blocks": [0]}, "block 0"),
        ("output_zero", {"scale": 2}, "no option 'scale'"),
        ("gate_scale", {}, "needs the option 'scale'"),
        ("gate_scale", {"scale": float("nan")}, "finite scale"),
        ("mean", {}, "needs statistics"),
        ("keep_order", {"order": 4}, "order among"),
        ("keep_order", {"order": 2}, "needs statistics"),
        ("hash_permute", {"branches": [0]}, "branches are still one"),
        ("branches", {}, "expects branches"),
        ("heads", {"heads": [9]}, "heads among"),
        ("quantise", {"bits": 5}, "bits 8, 4, 3 or 2"),
        ("prune_rows", {"fraction": 1.5}, "fraction in"),
        ("prune_rows", {"fraction": 0.5, "by": "use"}, "by use needs statistics"),
        ("mlp_zero", {}, "needs statistics"),
        ("output_zero", {"positions": torch.ones(12)}, "boolean mask"),
    ],
)
def test_bad_requests_name_what_was_expected(kind, arguments, message, tiny_engram):
    with pytest.raises(AblationError, match=message), ablate(tiny_engram, kind, **arguments):
        pytest.fail("a bad request was accepted")
    assert hook_count(tiny_engram) == 0


def test_a_model_without_memory_is_refused_but_can_be_a_control(tiny_moe, tokens):
    with pytest.raises(AblationError, match="without one"), ablate(tiny_moe, "output_zero"):
        pass
    before = tiny_moe(tokens)
    assert not torch.equal(run(tiny_moe, tokens, "mlp_zero", blocks=[0], match=False), before)
    assert np.isfinite(run(tiny_moe, tokens, "expert_zero", blocks=[2], experts=1).numpy()).all()
