"""Are the lens's numbers those of the obvious float64 computation, exactly 0 at the end, in bounded memory?"""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, normalizers

from engram_interp.cli import reading
from engram_interp.gallery import GallerySentence, Span
from engram_interp.kernels.lens import LensError, lens_readings, lens_readings_reference
from engram_interp.models.adapters import opening
from engram_interp.probes import lens_comparison
from engram_interp.probes.lens import logit_lens_kl, unigram_log_probabilities
from engram_interp.probes.lens_comparison import compare_lens, compare_seeds, read_and_compare
from engram_interp.probes.strata import NgramCounts, copied

NAMES = ("kl", "reverse_kl", "jensen_shannon", "entropy", "cross_entropy")


def marked(text: str, *spans: tuple[str, str, int]) -> GallerySentence:
    """A sentence with spans given as (text, kind, start)."""
    return GallerySentence("g001", text, "test", tuple(Span(t, kind, i, i + len(t)) for t, kind, i in spans))


# -- kernel ------------------------------------------------------------------------------------------------------------


def vectors(seed: int, sites: int, tokens: int, width: int, vocab: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(vocab, width, generator=generator) / width**0.5 * 4
    hidden = torch.randn(tokens, width, generator=generator)
    steps = torch.randn(sites, tokens, width, generator=generator) * torch.logspace(0.3, -4, sites)[:, None, None]
    steps[-1] = 0
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[-1] = -1
    return hidden + steps, hidden, head, targets


@pytest.mark.parametrize(("tokens", "vocab", "rows"), [(1, 50, 64), (65, 700, 64), (150, 4000, 32), (7, 300, 3)])
def test_kernel_agrees_with_float64(tokens: int, vocab: int, rows: int):
    sites, final, head, targets = vectors(tokens, 6, tokens, 24, vocab)
    found = lens_readings(sites, final, lambda h: h @ head.T, targets, rows=rows)
    logits = (sites.double() @ head.double().T).numpy()
    expected = lens_readings_reference(logits, logits[-1], targets.numpy())
    for name in NAMES:
        # these vectors reach 40 nats, where float32 itself resolves 4e-6: 1e-5 nats, and 1e-6 of the value
        np.testing.assert_allclose(getattr(found, name), expected[name], rtol=1e-6, atol=1e-5, err_msg=name)
    assert (found.kl[-1] == 0).all()
    assert (found.reverse_kl[-1] == 0).all()
    assert found.kl.min() >= -1e-6
    assert found.jensen_shannon.min() >= 0
    assert (found.top1 == torch.from_numpy(logits.argmax(-1))).float().mean() > 0.999
    assert found.final_top1.equal(found.top1[-1])


def test_kernel_in_float64():
    sites, final, head, targets = (x.double() if x.is_floating_point() else x for x in vectors(8, 4, 20, 16, 90))
    found = lens_readings(sites, final, lambda h: h @ head.T, targets)
    logits = (sites @ head.T).numpy()
    expected = lens_readings_reference(logits, logits[-1], targets.numpy())
    for name in NAMES:
        np.testing.assert_allclose(getattr(found, name), expected[name], atol=1e-12, err_msg=name)


def test_unigram_distance():
    sites, final, head, targets = vectors(9, 2, 40, 16, 90)
    unigram = torch.randn(90, generator=torch.Generator().manual_seed(1)).log_softmax(0)
    found = lens_readings(sites, final, lambda h: h @ head.T, targets, unigram=unigram, rows=7).unigram_kl
    p = (final.double() @ head.double().T).log_softmax(-1)
    torch.testing.assert_close(found.double(), (p.exp() * (p - unigram.double())).sum(-1), atol=1e-5, rtol=0)


def test_rounded_logits_are_refused():
    sites, final, head, targets = vectors(10, 2, 5, 16, 90)
    with pytest.raises(LensError, match=r"found torch.bfloat16.*0\.15 nats"):
        lens_readings(sites, final, lambda h: (h @ head.T).bfloat16(), targets)


def test_kernel_names_the_first_reading_that_is_not_finite():
    sites, final, head, targets = vectors(11, 3, 9, 16, 90)
    sites[1, 6, 0] = math.nan
    with pytest.raises(LensError, match="site 1, token 6"):
        lens_readings(sites, final, lambda h: h @ head.T, targets, rows=4)


MEMORY = """
import resource, sys, torch
torch.set_num_threads(1)
from tokenizers import Tokenizer
from engram_interp.memory import CompressedVocabulary
from engram_interp.models.config import ModelConfig
from engram_interp.models.house import HouseModel, initialise
from engram_interp.probes.lens import logit_lens_kl
tokenizer = Tokenizer.from_file(sys.argv[1])
config = ModelConfig(name="big", vocab_size=8192, context=2050, width=256, layers=12, heads=4, streams=1,
                     routed_experts=2, active_experts=1, expert_width=128, shared_width=128)
assert tokenizer.get_vocab_size() == 8192
model = HouseModel(config, CompressedVocabulary.identity(8192), tokenizer).eval().requires_grad_(False)
initialise(model, torch.Generator().manual_seed(0))
text = tokenizer.decode(torch.randint(1000, 6000, (6000,), generator=torch.Generator().manual_seed(1)).tolist())
text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids[:2048])
while len(tokenizer.encode(text, add_special_tokens=False).ids) > 2049:
    text = text[:-10]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
with torch.no_grad():
    model(model.to_tokens(text))
before = peak()
result = logit_lens_kl(model, [text])
assert result.tokens >= 2000 and result.sites == 13, (result.tokens, result.sites)
assert (result.kl[-1] == 0).all() and result.kl.min() >= -1e-6
print("PEAK", before, peak())
"""


@pytest.mark.slow
def test_memory_of_the_lens_above_a_forward(shared: Path):
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(shared / "vectors" / "tokenizer_8192.json")],
        capture_output=True, text=True, timeout=600, check=False, cwd=Path(__file__).resolve().parents[1],
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    forward, lens = map(float, run.stdout.split("PEAK")[1].split())
    print(f"peak RSS: forward {forward:.0f} MB, lens {lens:.0f} MB")
    assert lens - forward <= 150


# -- probe -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(tiny_engram, texts):
    return logit_lens_kl(tiny_engram, list(texts))


def test_probe_agrees_with_the_models_own_logits(tiny_engram, texts, result):
    tokens = tiny_engram.to_tokens(texts[3])
    residuals = tiny_engram.residuals(tokens)
    logits = torch.stack([tiny_engram.logits(site)[0, 1:] for site in residuals]).double().numpy()
    targets = np.append(tokens[0, 2:].numpy(), -1)
    expected = lens_readings_reference(logits, logits[-1], targets)
    of_text = result.document == 3
    assert of_text.sum() == tokens.shape[1] - 1
    for name in NAMES:
        np.testing.assert_allclose(getattr(result, name)[:, of_text], expected[name], atol=1e-5, err_msg=name)
    assert result.token_ids[of_text].tolist() == tokens[0, 1:].tolist()
    assert result.position[of_text].tolist() == list(range(1, tokens.shape[1]))


def test_last_layer_is_the_output_bit_for_bit(tiny_engram, texts, result):
    assert result.sites == tiny_engram.layers + 1
    assert (result.kl[-1] == 0).all()
    assert (result.kl[:-1] > 1e-3).any(1).all()
    assert result.agreement[-1].all()
    tokens = tiny_engram.to_tokens(texts[0])
    assert tiny_engram.unembed(tiny_engram.exit_hidden(tiny_engram.residuals(tokens)[-1])).equal(tiny_engram(tokens))


def test_start_tokens_are_excluded_and_counted(tiny_engram, texts, result):
    assert result.skipped == len(texts) == result.documents
    assert (result.position >= 1).all()
    assert result.tokens == sum(tiny_engram.to_tokens(t).shape[1] - 1 for t in texts)


def test_settling_depth_by_definition(result):
    for token in range(result.tokens):
        predictions = result.top1[:, token]
        expected = next(s for s in range(result.sites) if (predictions[s:] == predictions[-1]).all())
        assert result.settling_depth[token] == expected


def test_a_text_longer_than_the_context_is_read_once(tiny_engram, texts):
    long = " ".join(texts[:9])
    ids = tiny_engram.tokenizer.encode(long, add_special_tokens=False).ids
    assert len(ids) > tiny_engram.context
    found = logit_lens_kl(tiny_engram, [long])
    assert found.token_ids.tolist() == ids
    assert np.isnan(found.cross_entropy[:, -1]).all()
    assert np.isfinite(found.cross_entropy[:, :-1]).all()
    assert found.skipped == 1


def test_document_means_and_band(result):
    means = result.document_means("kl")
    assert means.shape == (result.documents, result.sites)
    np.testing.assert_allclose(means[2], result.kl[:, result.document == 2].mean(1), rtol=1e-6)
    band = result.band("kl")
    np.testing.assert_allclose(band.mean, result.kl.mean(1), rtol=1e-6)
    assert (band.low <= band.mean).all()
    assert band.critical > 2.2  # wider than one column's Student t with 11 degrees of freedom


def test_kl_alone_agrees_with_all_quantities(tiny_engram, texts, result):
    found = logit_lens_kl(tiny_engram, list(texts), quantities="kl")
    for name in ("kl", "cross_entropy"):
        np.testing.assert_allclose(getattr(found, name), getattr(result, name), atol=2e-5, err_msg=name)
    for name in ("reverse_kl", "jensen_shannon", "entropy", "unigram_kl"):
        assert np.isnan(getattr(found, name)).all()
    assert (found.kl[-1] == 0).all()
    assert (found.top1 == result.top1).mean() > 0.999
    assert (found.final_top1 == result.final_top1).all()
    assert set(found.table()["quantity"]) == {"kl", "cross_entropy", "agreement"}
    recorded = found.provenance.options
    assert recorded["arithmetic"] == "identity, float32 tiles"
    assert 0 <= recorded["kl_error"] <= 1e-5
    assert result.provenance.options["arithmetic"] == "all logits of a chunk, float32"


def test_kl_alone_of_a_head_that_is_not_a_plain_matrix(fresh_engram, texts):
    fresh_engram.requires_grad_(False)
    plain = fresh_engram.unembed
    fresh_engram.unembed = lambda hidden: 5 * torch.tanh(plain(hidden) / 5)
    found = logit_lens_kl(fresh_engram, list(texts[:2]), quantities="kl")
    assert found.provenance.options["arithmetic"] == "all logits of a chunk, float32"
    np.testing.assert_array_equal(found.kl, logit_lens_kl(fresh_engram, list(texts[:2])).kl)


def test_streams_are_read_one_at_a_time(tiny_engram, texts, result):
    found = [logit_lens_kl(tiny_engram, list(texts), stream=m) for m in range(2)]
    tokens = tiny_engram.to_tokens(texts[1])
    hidden = tiny_engram.residuals(tokens)[2][:, :, 1:2].expand(-1, -1, 2, -1)
    layer, final = (tiny_engram.logits(h)[0, 1:].double().numpy() for h in (hidden, tiny_engram.residuals(tokens)[-1]))
    expected = lens_readings_reference(layer[None], final, np.append(tokens[0, 2:].numpy(), -1))["kl"][0]
    np.testing.assert_allclose(found[1].kl[2, found[1].document == 1], expected, atol=1e-5)
    assert (found[0].kl[-1] > 0).any()  # one stream alone is not the final prediction
    np.testing.assert_allclose(found[0].kl[0], result.kl[0], atol=1e-6)  # at the embedding all streams are equal
    with pytest.raises(LensError, match=r"stream in \[0, 2\), found 2"):
        logit_lens_kl(tiny_engram, [texts[0]], stream=2)


def test_strata(tiny_engram, tokenizer):
    text = "By the way, the Prince of Wales met the Prince of Wales."
    first = text.index("Prince")
    item = marked(
        text,
        ("By the way", "phrase", 0),
        *(("Prince of Wales", "entity", i) for i in (first, text.index("Prince", first + 1))),
    )
    found = logit_lens_kl(tiny_engram, [item, "London by the sea"])
    ends = {
        name: [tokenizer.decode([int(t)]).strip() for t in found.token_ids[found.strata[name]]]
        for name in ("entity-final", "phrase-final")
    }
    assert len(ends["entity-final"]) == 2
    assert all("Wales".endswith(end) for end in ends["entity-final"])
    assert len(ends["phrase-final"]) == 1
    assert "way".endswith(ends["phrase-final"][0])
    others = found.strata["entity-final"] | found.strata["phrase-final"] | found.strata["copy"]
    assert (others != found.strata["rest"]).all()
    assert found.strata["copy"].sum() >= 3
    table = found.table()
    assert set(table[table.quantity == "kl"].stratum) == {"all", *found.strata}


def test_copy_and_frequency_masks_by_definition():
    tokens = np.array([1, 2, 3, 1, 2, 3, 9])
    assert copied(tokens).tolist() == [False, False, False, True, True, False, False]
    counts = NgramCounts.of([[1, 2] * 6, [2, 3]], order=2)
    assert counts.ending_at(tokens).tolist() == [-1, 6, 1, 0, 6, 1, 0]
    bins = counts.bins(tokens)
    assert {k: np.flatnonzero(v).tolist() for k, v in bins.items()} == {
        "2-gram 0": [3, 6], "2-gram 1-9": [1, 2, 4, 5], "2-gram 10-99": [], "2-gram 100+": []
    }  # fmt: skip
    with pytest.raises(ValueError, match="at least one 3-gram"):
        NgramCounts.of([[1, 2]], order=3)


def test_result_forms(result, tiny_engram):
    table = result.table()
    chosen = table[(table.stratum == "all") & (table.quantity == "kl") & (table.layer == 1)]
    assert len(chosen) == 1
    assert chosen["mean"].item() == pytest.approx(result.kl[1].mean(), rel=1e-6)
    assert chosen["low"].item() < chosen["median"].item()
    data = json.loads(json.dumps(result.as_dict()))
    assert set(data["kl"]["tiny-engram"]) == {"mean", "low", "high"}
    assert data["tokens"] == result.tokens
    assert data["provenance"]["models"] == {"tiny-engram": tiny_engram.identity.weights_sha256}
    assert len(result.figure("entropy").data) == 2
    with pytest.raises(ValueError, match="unknown quantity 'kll'"):
        result.values("kll")


def test_one_document_has_a_curve_but_no_band(tiny_engram, texts):
    found = logit_lens_kl(tiny_engram, [texts[0]])
    assert found.as_dict()["kl"]["tiny-engram"]["low"] is None
    assert len(found.figure().data) == 1
    assert found.table()["low"].isna().all()
    with pytest.raises(ValueError, match="at least 2"):
        found.band()


# -- comparison --------------------------------------------------------------------------------------------------------


def test_comparison_is_paired_and_says_what_it_covers(tiny_engram, tiny_moe, texts, result):
    other = logit_lens_kl(tiny_moe, list(texts))
    found = compare_lens(result, other)
    np.testing.assert_allclose(found.overall.difference.mean, result.kl.mean(1) - other.kl.mean(1), atol=1e-6)
    assert found.overall.auc.value == pytest.approx(found.overall.difference.mean[:-1].sum(), abs=1e-5)
    normalised = [r.kl[:-1].sum(0).mean() / r.unigram_kl.mean() for r in (result, other)]
    assert found.overall.auc_normalised.value == pytest.approx(normalised[0] - normalised[1], rel=1e-4)
    assert found.overall.difference.mean[-1] == found.overall.difference.high[-1] == 0
    assert "these two checkpoints only" in found.statement
    data = json.loads(json.dumps(found.as_dict()))
    assert set(data["kl"]) == {"tiny-engram", "tiny-moe"}
    assert set(data["difference"]) == {"mean", "low", "high"}
    assert data["layers"] == list(range(5))
    assert data["documents"] == len(texts)
    assert len(found.figure().data) == 4
    assert len(found.difference_figure().data) >= 2
    assert {"auc", "auc_normalised", "settling", "kl"} == set(found.table()["what"])


def test_a_model_does_not_differ_from_itself(result):
    found = compare_lens(result, result)
    assert found.models == ("tiny-engram (first)", "tiny-engram (second)")
    assert (found.overall.difference.low == 0).all()
    assert (found.overall.difference.high == 0).all()
    assert found.overall.auc.low == found.overall.auc.high == 0


def test_what_cannot_be_paired_is_refused(tiny_engram, texts, result):
    other = logit_lens_kl(tiny_engram, list(texts[:3]))
    with pytest.raises(ValueError, match="same texts"):
        compare_lens(result, other)
    with pytest.raises(ValueError, match="same stream"):
        compare_lens(result, logit_lens_kl(tiny_engram, list(texts), stream=0))


def test_models_with_different_tokenizers_are_refused(tiny_moe, texts, result):
    other = copy.deepcopy(tiny_moe)
    other.tokenizer = Tokenizer.from_str(tiny_moe.tokenizer.to_str())
    other.tokenizer.normalizer = normalizers.NFC()
    with pytest.raises(ValueError, match="one tokenizer"):
        compare_lens(result, logit_lens_kl(other, list(texts)))


def test_seed_is_the_unit_when_there_are_several(tiny_engram, tiny_moe, texts, result):
    others = []
    for seed in range(3):
        model = copy.deepcopy(tiny_moe)
        generator = torch.Generator().manual_seed(seed)
        for block in model.blocks:
            block.attn_stream.pre_logits.normal_(0, 1, generator=generator)
        others.append(logit_lens_kl(model, list(texts)))
    found = compare_seeds(others[:2], [others[2], result])
    areas = [r.kl[:-1].sum(0).mean() for r in (*others, result)]
    assert found.auc.value == pytest.approx(np.mean(areas[:2]) - np.mean(areas[2:]), rel=1e-5)
    assert found.auc.low < found.auc.value < found.auc.high
    with pytest.raises(ValueError, match="at least 2 seeds per arm, found 1 and 2.*these two checkpoints only"):
        compare_seeds(others[:1], others[1:])


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_texts(tiny_engram):
    with pytest.raises(LensError, match="at least one text, found none"):
        logit_lens_kl(tiny_engram, [])
    with pytest.raises(LensError, match="text 1: .*empty text"):
        logit_lens_kl(tiny_engram, ["fine", ""])
    with pytest.raises(LensError, match="found one string"):
        logit_lens_kl(tiny_engram, "a string")


def test_not_finite_activation_is_named(fresh_engram, texts):
    fresh_engram.requires_grad_(False)
    with (
        fresh_engram.hooks(fwd_hooks=[("blocks.2.hook_mlp_out", _spoil)]),
        pytest.raises(LensError, match=r"output of block 2 \(layer 3\) is not finite at position 4 of text 1"),
    ):
        logit_lens_kl(fresh_engram, [texts[9][:6], texts[0]])


def _spoil(value, hook):
    spoilt = value.clone()
    if value.shape[1] > 8:
        spoilt[:, 4, 0] = math.nan
    return spoilt


def test_unigram_counts():
    log_p = unigram_log_probabilities([[0, 1, 1], [1]], 4)
    np.testing.assert_allclose(np.exp(log_p), np.array([2, 4, 1, 1]) / 8)


# -- precision ---------------------------------------------------------------------------------------------------------


def test_fast_lens_states_its_error_and_its_choice(tiny_engram, tiny_moe, texts, result):
    found = logit_lens_kl(tiny_engram, list(texts), quantities="kl", precision="fast")
    options = found.provenance.options
    assert (options["precision"], options["quantities"]) == ("fast", "kl")
    assert "fast" in options["arithmetic_reason"]
    assert found.as_dict()["kl_error"] == found.kl_error == options["kl_error"]
    deviation = np.abs(found.kl.astype(np.float64) - result.kl)
    assert np.quantile(deviation, 0.9) <= found.kl_error + 1e-5
    assert deviation.max() <= 5 * found.kl_error + 1e-5
    if found.has_top1:  # a processor without bfloat16 products takes the exact path and says so
        assert "no bfloat16" in options["arithmetic_reason"]
        return
    assert found.kl_error > 1e-6
    assert np.isnan(found.values("agreement")).all()
    assert set(found.table()["quantity"]) == {"kl", "cross_entropy"}
    with pytest.raises(LensError, match="precision 'fast', which gives none"):
        _ = found.settling_depth
    both = compare_lens(found, logit_lens_kl(tiny_moe, list(texts), quantities="kl", precision="fast"))
    assert "no top-1" in both.overall.settling.reason
    assert "not measured" in both.overall.auc_normalised.reason
    exact = compare_lens(result, logit_lens_kl(tiny_moe, list(texts)))
    assert both.overall.auc.value == pytest.approx(
        exact.overall.auc.value, abs=4 * 2 * both.provenance.options["kl_error"]
    )
    assert "largest error of KL found" in both.arithmetic


@pytest.mark.usefixtures("unchecked_shapes")
def test_precision_is_checked(tiny_engram, texts, result):
    with pytest.raises(ValueError, match="quantities='kl' with precision='fast'"):
        logit_lens_kl(tiny_engram, list(texts[:1]), precision="fast")
    with pytest.raises(ValueError, match="precision exact or fast, found 'quick'"):
        logit_lens_kl(tiny_engram, list(texts[:1]), precision="quick")
    with pytest.raises(ValueError, match="same quantities in both results"):
        compare_lens(result, logit_lens_kl(tiny_engram, list(texts), quantities="kl"))


def test_every_exact_reading_is_within_the_accepted_error_of_float64(tiny_engram, texts, result):
    assert 0 <= result.kl_error <= 1e-5
    for found in (result, logit_lens_kl(tiny_engram, list(texts), quantities="kl")):
        for document in range(3):
            tokens = tiny_engram.to_tokens(texts[document])
            vectors = torch.stack([tiny_engram.exit_hidden(h)[0, 1:] for h in tiny_engram.residuals(tokens)])
            logits = (vectors.double() @ tiny_engram.W_U.double()).detach().numpy()
            expected = lens_readings_reference(logits, logits[-1], np.full(logits.shape[1], -1))["kl"]
            np.testing.assert_allclose(found.kl[:, found.document == document], expected, atol=1e-5)


def test_different_tokenizers_are_noticed_before_anything_is_read(tiny_engram, tiny_moe, monkeypatch):
    read = []
    monkeypatch.setattr(lens_comparison, "logit_lens_kl", lambda *a, **k: read.append(a))
    other = copy.copy(tiny_moe)
    other.tokenizer = Tokenizer.from_str(tiny_moe.tokenizer.to_str())
    other.tokenizer.normalizer = normalizers.NFC()
    with pytest.raises(ValueError, match="same tokenizer, found tiny-engram"):
        read_and_compare(tiny_engram, other, ["a text", "and another"])
    other = copy.copy(tiny_moe)
    other.cfg = tiny_moe.cfg.model_copy(update={"layers": 9})
    with pytest.raises(ValueError, match="number of blocks in both models, found 4 and 9"):
        read_and_compare(tiny_engram, other, ["a text", "and another"])
    assert not read


def test_command_takes_a_precision(tiny_engram, tiny_moe, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(opening, "open_decoders", lambda *paths, base: (tiny_engram, tiny_moe))
    (tmp_path / "texts.txt").write_text("\n".join(texts[:4]), encoding="utf-8")
    assert reading.lens("a", "b", texts=tmp_path / "texts.txt", precision="fast", json=True) == 0
    options = json.loads(capsys.readouterr().out)["provenance"]["options"]
    assert (options["precision"], options["quantities"]) == ("fast", "kl")
    assert options["kl_error"] >= 0
    assert reading.lens("a", "b", texts=tmp_path / "texts.txt", quantities="kl") == 0
    assert "arithmetic: identity, float32 tiles; largest error" in capsys.readouterr().out
