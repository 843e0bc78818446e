"""CKA against pinned values, brute force and the properties it must have."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_interp.kernels.cka import CKAGrid
from engram_interp.measure import hsic, hsic_documents
from engram_interp.measure.cka import cka_matrix, linear_cka, permutation_null

CASES = (
    "rational6x3", "small8", "shared64", "rotated", "anisotropic", "wide_independent", "negative", "massive_mean",
    "outlier_row", "documents",
)  # fmt: skip


def draw(n: int, d: int, seed: int, *, latent: float = 0.0) -> torch.Tensor:
    """Rows that share a two-dimensional latent with every other draw, to the extent asked for."""
    rng = np.random.default_rng(seed)
    z = np.random.default_rng(1000 + n).normal(size=(n, 2))
    return torch.tensor(latent * z @ rng.normal(size=(2, d)) + rng.normal(size=(n, d)))


def brute_hsic(x: torch.Tensor, y: torch.Tensor, documents: list[int]) -> float:
    """The U-statistic by its definition: every ordered 4-tuple of rows from four documents."""
    k, l = (x @ x.T).numpy(), (y @ y.T).numpy()
    total = count = 0
    for i, j, p, q in itertools.permutations(range(len(x)), 4):
        if len({documents[r] for r in (i, j, p, q)}) == 4:
            total += k[i, j] * l[i, j] + k[i, j] * l[p, q] - 2 * k[i, j] * l[i, p]
            count += 1
    return float(total / count)


def gram_hsic(x: torch.Tensor, y: torch.Tensor) -> float:
    """Song's formula from explicit Gram matrices."""
    n = len(x)
    k, l = x @ x.T, y @ y.T
    k.fill_diagonal_(0)
    l.fill_diagonal_(0)
    cross = (k.sum(0) @ l.sum(0)) * 2 / (n - 2)
    return float(((k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - cross) / (n * (n - 3)))


def gram_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return gram_hsic(x, y) / (gram_hsic(x, x) * gram_hsic(y, y)) ** 0.5


@pytest.fixture(scope="module")
def reference(shared):
    arrays = np.load(shared / "vectors" / "cka_reference.npz", allow_pickle=False)
    return arrays, json.loads((shared / "vectors" / "cka_reference.json").read_text())


@pytest.mark.reference
@pytest.mark.parametrize("case", CASES)
def test_pinned_values(reference, case):
    arrays, values = reference
    result, expected = linear_cka(arrays[f"{case}__X"], arrays[f"{case}__Y"]), values[case]
    assert result.value == pytest.approx(expected["cka_unbiased"], rel=1e-10)
    assert result.biased == pytest.approx(expected["cka_biased"], rel=1e-10)
    for side in ("xy", "xx", "yy"):
        assert getattr(result, f"hsic_{side}") == pytest.approx(expected[f"hsic_unbiased_{side}"], rel=1e-10)


@pytest.mark.reference
@pytest.mark.parametrize("case", CASES)
def test_pinned_values_streamed(reference, case):
    arrays, values = reference
    x, y = torch.tensor(arrays[f"{case}__X"]), torch.tensor(arrays[f"{case}__Y"])
    stream = CKAGrid([x.shape[1]], [y.shape[1]])
    for start in range(0, len(x), 5):
        stream.update([x[start : start + 5]], [y[start : start + 5]])
    found = stream.result()
    assert float(found.values) == pytest.approx(values[case]["cka_unbiased"], rel=1e-10)
    assert float(found.biased) == pytest.approx(values[case]["cka_biased"], rel=1e-10)


@pytest.mark.reference
def test_pinned_jackknife_permutation_and_documents(reference):
    arrays, values = reference
    x, y, expected = arrays["shared64__X"], arrays["shared64__Y"], values["shared64"]
    result = linear_cka(x, y)
    assert result.estimate.se == pytest.approx(expected["jackknife_se_cka_unbiased"], rel=1e-10)
    assert result.leave_one_out[:3] == pytest.approx(expected["loo_cka_first3"], rel=1e-10)
    permuted = linear_cka(x, y[arrays["shared64__perm"]])
    assert permuted.value == pytest.approx(expected["row_permutation_seed0_cka_unbiased"], rel=1e-10)
    x, y, documents = (arrays[f"documents__{name}"] for name in ("X", "Y", "doc"))
    result, expected = linear_cka(x, y, groups=documents), values["documents"]
    assert result.value == pytest.approx(expected["cka_doc_excluded"], rel=1e-10)
    assert result.hsic_xy == pytest.approx(expected["hsic_doc_excluded_xy"], rel=1e-10)
    assert result.documents == len(result.leave_one_out) == 10


@pytest.mark.reference
def test_pinned_float32_inputs_with_massive_mean(reference):
    arrays, values = reference
    x, y = arrays["massive_mean__X32"], arrays["massive_mean__Y32"]
    expected = values["massive_mean"]
    assert linear_cka(x, y).value == pytest.approx(expected["cka_unbiased_from_float32_inputs"], abs=1e-10)
    assert linear_cka(x, y).value == pytest.approx(expected["cka_unbiased_without_offset"], abs=1e-4)
    stream = CKAGrid([32], [32]).update([torch.tensor(x).double()], [torch.tensor(y).double()])
    assert float(stream.result().values) == pytest.approx(expected["cka_unbiased_from_float32_inputs"], abs=1e-10)


@pytest.mark.reference
def test_pinned_heatmap(reference):
    arrays, values = reference
    result = cka_matrix(list(arrays["heatmap__baseline"]), list(arrays["heatmap__engram"]))
    np.testing.assert_allclose(result.values, arrays["heatmap__S"], rtol=1e-10)
    np.testing.assert_allclose(result.values, values["heatmap"]["S_baseline_by_engram"], rtol=1e-10)


def test_same_value_as_every_leave_one_out_from_scratch():
    x, y = draw(12, 3, 0, latent=1), draw(12, 5, 1, latent=1)
    result = linear_cka(x, y)
    assert result.value == pytest.approx(gram_cka(x, y), rel=1e-10)
    for row in range(12):
        keep = torch.arange(12) != row
        assert result.leave_one_out[row] == pytest.approx(gram_cka(x[keep], y[keep]), rel=1e-9)


@pytest.mark.parametrize("moments", [hsic_documents._gram_moments, hsic_documents._feature_moments])
def test_documents_against_brute_force(monkeypatch, moments):
    monkeypatch.setattr(hsic_documents, "_gram_moments", moments)
    x, y = draw(10, 3, 2), draw(10, 2, 3)
    documents = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5])
    cells = hsic_documents.hsic_documents([x], [y], documents)
    assert float(cells.ab) == pytest.approx(brute_hsic(x, y, documents.tolist()), rel=1e-10)
    assert float(cells.bb) == pytest.approx(brute_hsic(y, y, documents.tolist()), rel=1e-10)
    for left_out in range(6):
        keep = documents != left_out
        expected = brute_hsic(x[keep], y[keep], documents[keep].tolist())
        assert float(cells.loo_ab[0, 0, left_out]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_documents_of_one_row_are_rows():
    x, y = draw(20, 4, 4, latent=1), draw(20, 3, 5, latent=1)
    rows, documents = hsic.hsic_rows([x], [y]), hsic_documents.hsic_documents([x], [y], torch.arange(20))
    torch.testing.assert_close(documents.loo_cka(), rows.loo_cka(), rtol=1e-10, atol=1e-12)
    assert float(rows.ab) == pytest.approx(brute_hsic(x[:], y[:], list(range(20))) if len(x) < 12 else gram_hsic(x, y))


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 40), st.integers(1, 12), st.integers(1, 12), st.integers(0, 10_000))
def test_features_and_grams_agree(n, dx, dy, seed):
    x, y = draw(n, dx, seed, latent=1), draw(n, dy, seed + 1, latent=1)
    x, y = x - x.mean(0), y - y.mean(0)
    cells, features = hsic.hsic_rows([x], [y]), hsic._pair_from_features(x, y)
    scale = float(x.square().sum() * y.square().sum()) / n**2
    assert float(cells.ab) == pytest.approx(gram_hsic(x, y), rel=1e-9, abs=1e-12 * scale)
    torch.testing.assert_close(features[0], cells.ab[0, 0], rtol=1e-9, atol=1e-12 * scale)
    torch.testing.assert_close(features[1:], cells.loo_ab[0, 0], rtol=1e-9, atol=1e-11 * scale, equal_nan=True)


def test_streaming_is_any_batching_and_any_split_over_processes():
    x, y = draw(500, 7, 6, latent=1) + 300, draw(500, 5, 7, latent=1) - 20
    expected = linear_cka(x, y)
    for sizes in ((500,), (1, 499), (3, 0, 100, 397), (250, 250)):
        stream = CKAGrid([7], [5])
        for bx, by in zip(x.split(list(sizes)), y.split(list(sizes)), strict=True):
            stream.update([bx], [by])
        assert float(stream.result().values) == pytest.approx(expected.value, rel=1e-10)
    parts = [CKAGrid([7], [5]).update([a], [b]) for a, b in zip(x.split(130), y.split(130), strict=True)]
    merged = CKAGrid([7], [5])
    for part in reversed(parts):
        merged.merge(part)
    result = merged.result()
    assert (result.n, merged.n) == (500, 500)
    assert float(result.values) == pytest.approx(expected.value, rel=1e-10)


def test_above_the_gram_limit_no_square_array(monkeypatch):
    x, y = draw(60, 6, 8, latent=1), draw(60, 4, 9, latent=1)
    below = cka_matrix([x, y], [y])
    grouped = cka_matrix([x, y], [y], groups=np.arange(60) // 3)
    monkeypatch.setattr(hsic, "GRAM_ROWS", 50)
    monkeypatch.setattr(hsic_documents, "GRAM_ROWS", 50)
    monkeypatch.setattr(hsic, "_u_centred", lambda *_: pytest.fail("formed rows of a Gram matrix"))
    above = cka_matrix([x, y], [y])
    np.testing.assert_allclose(above.values, below.values, rtol=1e-10)
    np.testing.assert_allclose(above.leave_one_out, below.leave_one_out, rtol=1e-9)
    above = cka_matrix([x, y], [y], groups=np.arange(60) // 3)
    np.testing.assert_allclose(above.leave_one_out, grouped.leave_one_out, rtol=1e-9)


def test_row_blocks_stay_within_memory_and_cover_every_row():
    blocks = hsic.row_blocks(4096, 60)
    assert [r for b in blocks for r in range(b.start, b.stop)] == list(range(4096))
    assert max(b.stop - b.start for b in blocks) * 4096 * 60 * 8 <= 64 * 2**20


def orthogonal(d: int) -> torch.Tensor:
    return torch.linalg.qr(draw(d, d, 99))[0]


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        (lambda x: x, 1e-10),
        (lambda x: x @ orthogonal(8), 1e-10),
        (lambda x: x * 1e6, 1e-10),
        (lambda x: x * 1e-6, 1e-10),
        (lambda x: x + 1e4, 1e-10),
        (lambda x: torch.cat([x, torch.zeros(len(x), 3)], 1), 1e-10),
        (lambda x: torch.cat([x, x], 1), 1e-10),
        (lambda x: (x @ orthogonal(8) * 100 + 7).float(), 1e-4),
    ],
    ids=["same", "rotated", "large", "small", "translated", "zero columns", "duplicated features", "float32"],
)
def test_invariances(change, tolerance):
    x, y = draw(50, 8, 10, latent=1), draw(50, 6, 11, latent=1)
    assert linear_cka(x, change(x)).value == pytest.approx(1, abs=tolerance)
    value = linear_cka(x, y).value
    assert 0.1 < value < 0.99
    assert linear_cka(change(x), y).value == pytest.approx(value, abs=tolerance)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert linear_cka(x[order], y[order]).value == pytest.approx(value, rel=1e-10)
    assert linear_cka(y, x).value == pytest.approx(value, rel=1e-10)


def test_what_it_is_not_invariant_to():
    x, y = draw(50, 8, 12, latent=1), draw(50, 8, 13, latent=1)
    assert linear_cka(x, x * torch.tensor([10.0] + 7 * [1.0])).value < 0.9
    assert linear_cka(x.repeat(2, 1), y.repeat(2, 1)).value != pytest.approx(linear_cka(x, y).value, abs=1e-3)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert abs(linear_cka(x, y[order]).value) < 0.2


def test_wide_independent_rows_are_not_similar_although_the_biased_value_says_so():
    values = [linear_cka(draw(64, 128, 2 * s), draw(64, 128, 2 * s + 1)) for s in range(20)]
    assert np.mean([v.biased for v in values]) == pytest.approx(128 / (64 + 128), abs=0.02)
    assert np.mean([v.value for v in values]) == pytest.approx(0, abs=0.02)
    assert any("biased value" in w for w in values[0].warnings)


def test_diagnostics_catch_one_shared_feature_one_outlier_row_and_say_nothing_otherwise():
    x, y = draw(400, 20, 20), draw(400, 20, 21)
    assert linear_cka(x, y, companions=False).warnings == ()
    massive = 300 * torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shared_x, shared_y = x.clone(), y.clone()
    shared_x[:, 3] += massive
    shared_y[:, 5] += massive
    result = linear_cka(shared_x, shared_y)
    assert result.value > 0.99
    assert abs(result.drop_top) < 0.05
    assert result.spread_x.participation_ratio < 1.1
    assert (result.spread_x.top_feature, result.spread_y.top_feature) == (3, 5)
    assert any("feature 3 carries" in w for w in result.warnings)
    assert any("drop_top" in w for w in result.warnings)
    outlier_x, outlier_y = x.clone(), y.clone()
    outlier_x[7] += 1000
    outlier_y[7] += 1000
    result = linear_cka(outlier_x, outlier_y)
    assert result.biased > 0.99
    assert abs(result.rms) < 0.1
    assert result.spread_x.top_row == 7
    assert any("row 7 carries" in w for w in result.warnings)


def test_spread_is_the_same_from_covariance_and_from_gram():
    from engram_interp.measure.cka_diagnostics import spread

    x = draw(30, 30, 22) * torch.linspace(1, 3, 30)
    wide = torch.cat([x, torch.zeros(30, 5)], 1)  # more features than rows: the Gram route
    assert spread(wide).as_dict() == pytest.approx(spread(x).as_dict())
    covariance = x.T @ x
    assert spread(x).participation_ratio == pytest.approx(float(covariance.trace() ** 2 / covariance.square().sum()))


def test_documents_remove_the_similarity_that_a_document_effect_makes():
    rng, pooled, excluded = np.random.default_rng(0), [], []
    documents = np.repeat(np.arange(30), 8)
    for _ in range(20):
        x, y = (rng.normal(size=(30, 24))[documents] + rng.normal(size=(240, 24)) for _ in range(2))
        pooled.append(linear_cka(x, y, companions=False).value)
        excluded.append(linear_cka(x, y, groups=documents, companions=False).value)
    assert np.mean(excluded) == pytest.approx(0, abs=0.02)
    assert np.mean(pooled) > 0.05


def test_permutation_null_and_matrix_null():
    x, y = draw(60, 5, 30, latent=2), draw(60, 5, 31, latent=2)
    rng = np.random.default_rng(0)
    result = linear_cka(x, y, permutations=99, rng=rng)
    assert result.p_value == pytest.approx(0.01)
    assert 0 < result.null_95 < result.value
    noise = [draw(60, 5, 40 + i) for i in range(3)]
    one = permutation_null(noise[:1], noise[1:2], permutations=50, rng=np.random.default_rng(1))
    several = permutation_null(noise, noise[::-1], permutations=50, rng=np.random.default_rng(1))
    assert (several >= one - 1).all()
    assert several.mean() > one.mean()
    grouped = linear_cka(x, y, groups=np.repeat(np.arange(20), [1, 2, 3, 6] * 5), permutations=20, rng=rng)
    assert 0 < grouped.p_value <= 1


def test_matrix_cells_are_the_pairs_and_differences_use_their_covariance():
    a, b = [draw(40, 4, s, latent=1) for s in (50, 51)], [draw(40, 3, s, latent=s % 2) for s in (52, 53, 54)]
    matrix = cka_matrix(a, b)
    for i, j in itertools.product(range(2), range(3)):
        pair = linear_cka(a[i], b[j])
        assert matrix.values[i, j] == pytest.approx(pair.value, rel=1e-10)
        assert matrix.se[i, j] == pytest.approx(pair.estimate.se, rel=1e-9)
        assert matrix.high[i, j] == pytest.approx(pair.high, rel=1e-9)
        assert matrix.companions["rms"][i, j] == pytest.approx(pair.rms, rel=1e-9)
        assert matrix.companions["biased"][i, j] == pytest.approx(pair.biased, rel=1e-9)
    difference = matrix.difference((0, 1), (0, 0))
    variance = matrix.se[0, 1] ** 2 + matrix.se[0, 0] ** 2 - 2 * matrix.covariance((0, 1), (0, 0))
    assert difference.se == pytest.approx(variance**0.5, rel=1e-9)
    same = cka_matrix(a, a)
    assert np.diag(same.values) == pytest.approx(1, abs=1e-12)
    assert same.difference((0, 0), (1, 1)).value == pytest.approx(0, abs=1e-12)
    assert same.low[0, 0] <= 1 + 1e-12
    assert same.high[0, 0] >= 1 - 1e-12


@pytest.mark.parametrize(
    ("x", "y", "groups", "message"),
    [
        (torch.ones(3, 2), torch.ones(3, 2), None, "at least 4 rows, found 3"),
        (draw(8, 2, 0), draw(7, 2, 1), None, "same rows on both sides, found 8 and 7"),
        (draw(8, 2, 0), draw(8, 2, 1), [0] * 8, "at least 4 documents, found 1"),
        (draw(8, 2, 0), draw(8, 2, 1), [0] * 7, "one group per row, found 7 groups for 8 rows"),
        (draw(8, 2, 0), torch.full((8, 2), 0.3), None, "zero variance in y: all 8 rows are equal"),
    ],
)  # fmt: skip
def test_clear_errors(x, y, groups, message):
    with pytest.raises(ValueError, match=message):
        linear_cka(x, y, groups=groups)


def test_nan_is_named_by_layer_and_position():
    bad = draw(8, 3, 1)
    bad[5, 2] = torch.nan
    with pytest.raises(ValueError, match="found nan in layer 1 of b, row 5, feature 2"):
        cka_matrix([draw(8, 3, 0)], [draw(8, 3, 2), bad])
    with pytest.raises(ValueError, match=r"expected a numpy Generator"):
        linear_cka(draw(8, 3, 0), draw(8, 3, 1), permutations=5)


def test_undefined_values_say_why():
    lonely = torch.zeros(8, 3)
    lonely[5] = 1.0  # no two rows differ but for one: HSIC_u of this side with itself is exactly 0
    result = linear_cka(lonely, draw(8, 3, 1), companions=False)
    assert np.isnan(result.value)
    assert not result.estimate.estimable
    assert any("x, y: undefined" in w for w in result.warnings)


@pytest.mark.slow
def test_calibration_of_the_null():
    """200 unrelated pairs: the permutation test rejects 5 % +- 3 %."""
    rng, rejected = np.random.default_rng(7), 0
    for _ in range(200):
        x, y = rng.standard_t(4, size=(30, 4)), rng.normal(size=(30, 6))
        rejected += linear_cka(x, y, permutations=99, rng=rng, companions=False).p_value <= 0.05
    assert 0.02 <= rejected / 200 <= 0.08


def related(rng: np.random.Generator, n: int, groups: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A pair with a known relation: y is half of x and half noise; rows of a group share part of both."""
    x, noise = rng.normal(size=(n, 6)), rng.normal(size=(n, 6))
    if groups is not None:
        x, noise = (0.6 * rng.normal(size=(groups.max() + 1, 6))[groups] + 0.8 * v for v in (x, noise))
    return x * np.array([2, 1.5, 1, 1, 0.7, 0.5]), x + noise


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [False, True])
def test_coverage_of_the_interval(grouped):
    """200 samples of one population: the 95 % jackknife interval holds the truth at least 90 % of the time."""
    rng, n = np.random.default_rng(3), 160
    groups = np.arange(n) // 4 if grouped else None
    # Var(x) = diag(s^2), y = x/s + noise: the population CKA from the covariances.
    s = np.array([2, 1.5, 1, 1, 0.7, 0.5])
    cross, own, other = np.diag(s), np.diag(s**2), 2 * np.eye(6)
    truth = (cross**2).sum() / (np.linalg.norm(own) * np.linalg.norm(other))
    held = 0
    for _ in range(200):
        result = linear_cka(*related(rng, n, groups), groups=groups, companions=False)
        held += result.low <= truth <= result.high
    assert held / 200 >= 0.90
