"""The soft alignment index, the estimators beside it, and the claims they allow."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engram_interp.measure.alignment import (
    calibrated_depth,
    half_sample_heatmaps,
    half_sample_probabilities,
    half_sample_weights,
    parabola_argmax,
    profile_match,
    shift_band,
    soft_alignment,
)
from engram_interp.measure.alignment_claim import alignment_claim, seed_pair_evidence
from engram_interp.measure.cka import cka_matrix

LAYERS = np.arange(12)


def falling(rows: np.ndarray, columns: np.ndarray, rate: float = 0.01) -> np.ndarray:
    return 1 - rate * np.abs(rows[:, None] - columns[None])


@pytest.mark.reference
def test_figure_4b_of_the_paper(shared):
    figures = json.loads((shared / "vectors" / "paper_figures.json").read_text())
    heatmap = np.array(figures["fig4b_cka_moe_row_engram27B_col"])
    printed = np.array(figures["fig4b_white_line_a_j"])
    assert heatmap.shape == (30, 30)
    assert np.abs(soft_alignment(heatmap) - printed).max() <= 0.2
    # The values were read off colours, so several tie at the fifth place; only there does the rule for ties matter.
    lower = soft_alignment(heatmap, ties="lower")
    ranked = -np.sort(-heatmap, axis=0)
    tied = ranked[4] == ranked[5]
    assert np.abs(lower - printed)[~tied].max() <= 0.2
    assert np.array_equal(lower[~tied], soft_alignment(heatmap)[~tied])


@pytest.mark.reference
@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("ties", ["central", "lower"])
def test_pinned_index(shared, k, ties):
    expected = json.loads((shared / "vectors" / "cka_reference.json").read_text())["heatmap"]
    heatmap = np.array(expected["S_baseline_by_engram"])
    index = soft_alignment(heatmap, k, ties=ties)
    np.testing.assert_allclose(index, expected[f"soft_alignment_k{k}_zero_based"], rtol=1e-12)
    if k == 5:
        np.testing.assert_allclose(index + 1, expected["soft_alignment_k5_one_based"], rtol=1e-12)
    assert heatmap.argmax(0).tolist() == expected["argmax"]


@pytest.mark.reference
def test_pinned_self_null(shared):
    arrays = np.load(shared / "vectors" / "cka_reference.npz", allow_pickle=False)
    expected = json.loads((shared / "vectors" / "cka_reference.json").read_text())["heatmap"]
    own = cka_matrix(list(arrays["heatmap__baseline"]), list(arrays["heatmap__baseline"]))
    np.testing.assert_allclose(soft_alignment(own.values, 5), expected["self_null_soft_k5_zero_based"], rtol=1e-9)


def test_a_model_aligned_with_itself_does_not_read_as_the_identity():
    index = soft_alignment(falling(LAYERS, LAYERS), 5)
    assert index[0] == pytest.approx(97 / 49, abs=1e-15)
    assert index[5] == pytest.approx(5)
    assert index[-1] < 10


def test_index_by_hand_ties_and_errors():
    heatmap = np.array([[0.9, 0.1], [0.6, 0.2], [0.3, 0.7]])
    assert soft_alignment(heatmap, 2) == pytest.approx([0.6 / 1.5, (0.2 + 1.4) / 0.9])
    flat = np.ones((5, 1))
    assert soft_alignment(flat, 3)[0] == 2
    assert soft_alignment(flat, 3, ties="lower")[0] == 1
    assert np.isnan(soft_alignment(-flat, 3)[0])
    with pytest.raises(ValueError, match="k between 1 and the 5 baseline layers, found 6"):
        soft_alignment(flat, 6)
    with pytest.raises(ValueError, match="found nan at row 1, column 0"):
        soft_alignment(np.array([[1.0], [np.nan]]), 1)


@pytest.mark.parametrize(
    "geometry",
    [
        lambda u, v: np.exp(-((u - v) ** 2) / 200),
        lambda u, v: np.sqrt((np.minimum(u, v) + 1) / (np.maximum(u, v) + 1)),
    ],
    ids=["uniform", "residual"],
)
def test_profile_match_and_parabola_find_a_warp_that_the_index_blurs(geometry):
    layers = np.arange(30)
    warp = np.interp(layers, [0, 5, 29], [0, 12, 29])
    noise = np.random.default_rng(0).normal(0, 0.003, (30, 30))
    own, heatmap = geometry(layers[:, None], layers[None]), 0.9 * geometry(layers[:, None], warp[None]) + noise
    errors = {
        "profile": np.abs(profile_match(heatmap, own) - warp).mean(),
        "index": np.abs(soft_alignment(heatmap) - warp).mean(),
    }
    assert errors["profile"] < 0.1 < 0.3 < errors["index"]
    assert profile_match(own, own) == pytest.approx(layers, abs=0.5)
    assert np.abs(parabola_argmax(0.9 * geometry(layers[:, None], warp[None])) - warp).mean() < 0.2
    with pytest.raises(ValueError, match="baseline's own heat map with 30 rows"):
        profile_match(heatmap, own[:5, :5])


def test_parabola_is_exact_on_a_parabola_and_keeps_the_ends():
    rows, peak = np.arange(9), np.array([3.3, 5.0, 0.0, 8.0])
    assert parabola_argmax(1 - (rows[:, None] - peak) ** 2 / 50) == pytest.approx(peak)
    assert parabola_argmax(np.array([[1.0], [1.0]])) == pytest.approx([0.0])


def test_calibrated_depth_inverts_the_null():
    null = soft_alignment(falling(LAYERS, LAYERS), 5)
    inner = slice(2, 10)
    assert calibrated_depth(null, null)[inner] == pytest.approx(LAYERS[inner])
    warped = soft_alignment(falling(LAYERS, LAYERS + 2.0), 5)
    assert calibrated_depth(warped, null)[3] == pytest.approx(5)
    rising = np.array([2.0, 2.0, 3.0, 2.5, 4.0])  # a plateau gives its middle, a dip is levelled
    assert calibrated_depth(np.array([-1.0, 2.0, 3.0, 3.5, 9.0]), rising).tolist() == [0.5, 0.5, 2.5, 3.25, 4.0]


def layers_at(
    depths, rng: np.random.Generator, rotation: np.random.Generator, n: int, noise: float
) -> list[np.ndarray]:
    """Representations along one path: what depth t holds moves smoothly through a basis shared by all models."""
    basis = np.random.default_rng(5).normal(size=(n, 40))
    centres = np.arange(40) / 40 * 12
    spread = [basis * np.exp(-((centres - t) ** 2) / 8) for t in depths]
    return [x @ np.linalg.qr(rotation.normal(size=(40, 40)))[0] + noise * rng.normal(size=(n, 40)) for x in spread]


def evidence(engram_depths, *, control_depths=range(10), n=80, control=True):
    rng = np.random.default_rng(1)
    baseline = layers_at(range(10), rng, rng, n, 0.05)
    engram = layers_at(engram_depths, rng, rng, n, 0.05)
    other = layers_at(control_depths, rng, rng, n, 0.05)
    loo = lambda a, b: (lambda m: (m.values, m.leave_one_out))(cka_matrix(a, b, companions=False))  # noqa: E731
    weights = half_sample_weights(n, 100, np.random.default_rng(2))
    null = loo(baseline, other) if control else None
    return seed_pair_evidence("engram against baseline", loo(baseline, engram), loo(baseline, baseline), null, weights)


def test_a_true_shift_is_claimed_and_the_sentence_states_everything():
    found = evidence(np.arange(10) * 0.7 + 2.5)
    claim = alignment_claim([found, found], 3)
    assert claim.allowed
    assert claim.verdict == "deeper"
    assert found.depth[3] == pytest.approx(4.6, abs=0.3)
    for part in (
        "Engram layer 3 matches MoE layer 4.",
        "95% over documents",
        "methods",
        "2 seed pairs",
        "seed-null shift",
    ):
        assert part in claim.sentence
    assert f"paper's index {found.index[3]:.1f}" in claim.sentence


def test_a_shift_the_null_shows_too_is_refused():
    shifted = np.arange(10) * 0.7 + 2.5
    found = evidence(shifted, control_depths=shifted)
    for layer in range(10):
        claim = alignment_claim([found], layer)
        assert not claim.allowed, claim.sentence
        assert "explained by the null" in claim.sentence
        assert claim.sentence.startswith(f"No claim for Engram layer {layer}")


def test_no_effect_gives_no_claim_although_the_index_is_shifted():
    found = evidence(np.arange(10.0))
    assert found.index[0] - 0 > 1
    assert [alignment_claim([found], j).allowed for j in range(10)] == [False] * 10


def test_without_control_when_unrelated_or_when_seed_pairs_disagree_nothing_is_claimed():
    alone = evidence(np.arange(10) * 0.7 + 2.5, control=False)
    assert "without another seed" in alignment_claim([alone], 3).sentence
    deeper = evidence(np.arange(10) * 0.7 + 2.5)
    assert "does not exceed 2.000" in alignment_claim([deeper], 3, unrelated=2.0).sentence
    assert alignment_claim([deeper], 3, unrelated=0.1).allowed
    shallower = evidence(np.maximum(np.arange(10) * 0.7 - 1, 0))
    assert shallower.beyond_null.high[6] < 0
    assert alignment_claim([shallower], 6).verdict == "shallower"
    deeper_at_6 = evidence(np.arange(10) * 0.3 + 6)
    assert deeper_at_6.beyond_null.low[6] > 0
    assert "disagree" in alignment_claim([deeper_at_6, shallower], 6).sentence
    with pytest.raises(ValueError, match=r"layer in \[0, 10\), found 10"):
        alignment_claim([deeper], 10)
    with pytest.raises(ValueError, match="expected the control to have 10 residual sites"):
        evidence(np.arange(10.0), control_depths=range(9))
    json.dumps(deeper.as_dict())


def test_half_samples_from_pseudo_values_vary_as_real_half_samples_do():
    rng, n = np.random.default_rng(4), 100
    x = rng.normal(size=(n, 5))
    layers = [x + s * rng.normal(size=(n, 5)) for s in (0.5, 1.0)]
    matrix = cka_matrix([x], layers, companions=False)
    weights = half_sample_weights(n, 300, rng)
    assert weights.sum(1) == pytest.approx(np.ones(300))
    assert set((weights > 0).sum(1)) == {50}
    draws = half_sample_heatmaps(matrix.values, matrix.leave_one_out, weights)
    real = np.stack([cka_matrix([x[w > 0]], [y[w > 0] for y in layers], companions=False).values for w in weights])
    assert draws.std(0) == pytest.approx(real.std(0), rel=0.15)
    assert draws.std(0) == pytest.approx(matrix.se, rel=0.15)
    assert np.corrcoef(draws[:, 0, 0], real[:, 0, 0])[0, 1] > 0.9
    probabilities = half_sample_probabilities(draws)
    assert probabilities.sum(0) == pytest.approx(np.ones(2))
    with pytest.raises(ValueError, match="at least 4 documents"):
        half_sample_weights(3, 10, rng)


def test_shift_band_covers_all_layers_at_once():
    rng = np.random.default_rng(0)
    draws, null = rng.normal(size=(500, 6)) + np.arange(6), np.zeros((500, 6))
    band = shift_band(np.arange(6.0), np.zeros(6), draws, null)
    inside = ((draws >= band.low) & (draws <= band.high)).all(1).mean()
    assert inside == pytest.approx(0.95, abs=0.01)
    biased = shift_band(np.zeros(2), np.zeros(2), np.array([[0.5, -0.5], [0.5, -0.5]]), np.zeros((2, 2)))
    assert (biased.low.tolist(), biased.high.tolist()) == ([0.0, -0.5], [0.5, 0.0]), (
        "wider on the side of the bias alone"
    )
    still = shift_band(np.ones(3), np.ones(3), np.ones((9, 3)), np.ones((9, 3)))
    assert np.array_equal(still.low, np.zeros(3))
    assert np.array_equal(still.high, np.zeros(3))
