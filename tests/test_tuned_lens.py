"""Does training bring the sites closer to the final prediction on unseen texts, and is a lens bound to its model?"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from engram_interp.kernels.lens import LensError
from engram_interp.models.checkpoint import CheckpointError
from engram_interp.models.protocol import Decoder
from engram_interp.probes.lens import Lens, logit_lens_kl
from engram_interp.probes.lens_comparison import compare_lens
from engram_interp.probes.tuned_lens import DESCRIPTION, WEIGHTS, TunedLensConfig, load_tuned_lens, train_tuned_lens

CONFIG = TunedLensConfig(steps=30, rows=48, learning_rate=1e-2, held_out=0.25, evaluations=6)


@pytest.fixture(scope="module")
def lens(tiny_engram, texts):
    return train_tuned_lens(tiny_engram, list(texts), generator=torch.Generator().manual_seed(0), config=CONFIG)


def test_training_lowers_the_held_out_kl(tiny_engram, texts, lens):
    held = list(texts[9:])
    before, after = (logit_lens_kl(tiny_engram, held, lens=one) for one in (None, lens))
    assert (after.kl[-1] == 0).all()
    assert after.kl[:-1].mean() < 0.9 * before.kl[:-1].mean()
    assert (after.kl[:-1].mean(1) <= before.kl[:-1].mean(1) + 1e-6).all()  # no site ends worse than it began
    assert after.lens == "tuned lens"


def test_history_starts_at_the_logit_lens(tiny_engram, texts, lens):
    logit_lens = logit_lens_kl(tiny_engram, list(texts[9:]))
    np.testing.assert_allclose(lens.history[0], logit_lens.kl[:-1].mean(1), atol=1e-5)
    assert lens.history_steps == (0, 5, 10, 15, 20, 25, 30)
    assert lens.history.shape == (7, tiny_engram.layers)
    means = lens.history.mean(1)
    assert lens.remaining_gain == pytest.approx((means[-2] - means[-1]) / means[-1])
    assert lens.converged == (lens.remaining_gain < 0.02)
    assert len(lens.table()) == 28
    assert len(lens.figure().data) == 1


def test_training_is_reproducible_from_its_generator(tiny_engram, texts):
    config = TunedLensConfig(steps=3, rows=32, evaluations=2)
    first, again, other = (
        train_tuned_lens(tiny_engram, list(texts[:5]), generator=torch.Generator().manual_seed(seed), config=config)
        for seed in (1, 1, 2)
    )
    assert first.weight.equal(again.weight)
    assert not first.weight.equal(other.weight)


def test_the_translator_acts_after_the_mean_over_streams_too(tiny_engram, texts, lens):
    hidden = tiny_engram.residuals(tiny_engram.to_tokens(texts[0]))[2]
    mean = tiny_engram.reduce_streams(hidden)
    expected = mean + mean @ lens.weight[2].T + lens.bias[2]
    torch.testing.assert_close(tiny_engram.reduce_streams(lens.translate(2, hidden)), expected, atol=1e-5, rtol=1e-5)
    assert isinstance(lens, Lens)
    assert isinstance(tiny_engram, Decoder)


def test_saved_and_loaded(tiny_engram, texts, lens, tmp_path):
    lens.save(tmp_path)
    again = load_tuned_lens(tmp_path)
    assert again.weight.equal(lens.weight)
    assert again.bias.equal(lens.bias)
    assert again.config == lens.config
    np.testing.assert_array_equal(again.history, lens.history)
    one, two = (logit_lens_kl(tiny_engram, list(texts[:2]), lens=x) for x in (lens, again))
    assert (one.kl == two.kl).all()


def test_damaged_files_are_refused(lens, tmp_path):
    lens.save(tmp_path)
    description = json.loads((tmp_path / DESCRIPTION).read_text())
    (tmp_path / DESCRIPTION).write_text(json.dumps(description | {"surprise": 1}))
    with pytest.raises(CheckpointError, match="surprise"):
        load_tuned_lens(tmp_path)
    (tmp_path / DESCRIPTION).write_text(json.dumps(description | {"width": 16}))
    with pytest.raises(CheckpointError, match=r"shape \(4, 16, 16\), found \(4, 32, 32\)"):
        load_tuned_lens(tmp_path)
    (tmp_path / DESCRIPTION).write_text(json.dumps(description))
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:500])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        load_tuned_lens(tmp_path)
    (tmp_path / DESCRIPTION).unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load_tuned_lens(tmp_path)


def test_a_lens_of_another_model_is_refused(tiny_engram, tiny_moe, texts, lens):
    with pytest.raises(LensError, match="found one of 'tiny-engram'"):
        logit_lens_kl(tiny_moe, list(texts), lens=lens)
    with pytest.raises(ValueError, match="same lens"):
        compare_lens(logit_lens_kl(tiny_engram, list(texts)), logit_lens_kl(tiny_engram, list(texts), lens=lens))


def test_bad_texts(tiny_engram):
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(LensError, match="at least 2 texts"):
        train_tuned_lens(tiny_engram, ["one"], generator=generator)
    with pytest.raises(LensError, match="empty text"):
        train_tuned_lens(tiny_engram, ["one", ""], generator=generator)
