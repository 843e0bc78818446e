"""The self-check: it passes on what is right, and each kind of fault fails the row that is about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engram_interp.models.check import check_model, plain_slots, run_check
from engram_interp.models.check_recorded import recorded_rows
from engram_interp.models.check_report import worst_element
from engram_interp.models.house import HouseModel
from engram_interp.models.site import EngramSite, sites_of

TOKENS = torch.tensor([[5, 8, 21, 8, 40, 77, 5, 8]])


def failed(model: HouseModel) -> set[str]:
    """Names of the failing checks, without their block."""
    return {row.check.split(" ", 1)[-1] for row in check_model(model).rows if not row.ok}


def test_a_sound_model_passes(tiny_engram: HouseModel, capsys: pytest.CaptureFixture[str]) -> None:
    report = check_model(tiny_engram)
    assert report.ok, [row for row in report.rows if not row.ok]
    assert list(report.table().columns) == ["check", "expected", "found", "ok"]
    assert run_check(tiny_engram) == 0
    assert f"{len(report.rows)} of {len(report.rows)} checks hold" in capsys.readouterr().out
    assert report.provenance.models == {"tiny-engram": tiny_engram.identity.weights_sha256}


def set_(parameter: torch.Tensor, value: float) -> None:
    with torch.no_grad():
        parameter.view(-1)[0] = value


def another_multiplier(model: HouseModel) -> None:
    ngram_hash = model.engram(1).ngram_hash
    model.engram(1).ngram_hash = replace(ngram_hash, multipliers=(7, *ngram_hash.multipliers[1:]), _constants={})


def forgetful_gate(model: HouseModel) -> None:
    model.engram(3).score = lambda hidden, key: (hidden * key).sum(-1)


def anti_causal_hash(model: HouseModel) -> None:
    ngram_hash = model.engram(1).ngram_hash
    object.__setattr__(
        ngram_hash, "slots_of_mix", lambda mix: type(ngram_hash).slots_of_mix(ngram_hash, mix.roll(-1, 1))
    )


def bigrams_in_trigram_heads(model: HouseModel) -> None:
    ngram_hash = model.engram(1).ngram_hash
    same = lambda mix: type(ngram_hash).slots_of_mix(ngram_hash, mix[..., :1].expand_as(mix))  # noqa: E731
    object.__setattr__(ngram_hash, "slots_of_mix", same)


@pytest.mark.parametrize(
    ("fault", "caught"),
    [
        (lambda model: set_(model.engram(1).table.weight, float("nan")), {"finite rows"}),
        (another_multiplier, {"multipliers"}),
        (forgetful_gate, {"gate recomputed", "gated_value recomputed", "engram_out recomputed"}),
        (anti_causal_hash, {"slots", "n-gram window", "causality"}),
        (bigrams_in_trigram_heads, {"slots", "n-gram window"}),
    ],
)
def test_a_fault_fails_its_own_check(
    fresh_engram: HouseModel, fault: Callable[[HouseModel], None], caught: set[str]
) -> None:
    model = fresh_engram.requires_grad_(False)
    assert failed(model) == set()
    fault(model)
    found = failed(model)
    assert caught <= found
    assert "recording" not in found


def test_a_second_exit_path_is_found(fresh_engram: HouseModel) -> None:
    model = fresh_engram.requires_grad_(False)
    model.logits = lambda hidden: model.unembed(model.ln_final(hidden[:, :, 0]))
    assert failed(model) == {"path"}


def test_a_failure_names_what_was_expected_and_found(
    fresh_engram: HouseModel, capsys: pytest.CaptureFixture[str]
) -> None:
    another_multiplier(fresh_engram)
    assert run_check(fresh_engram) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG"))
    expected = sites_of(fresh_engram)[0].regenerated.multipliers
    assert line == f"WRONG blocks.1 multipliers: expected {expected} regenerated, found {(7, *expected[1:])}"
    assert run_check(fresh_engram, json=True) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_nothing_to_check_is_an_error(tiny_moe: HouseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check(tiny_moe) == 1
    assert "expected a model with a memory" in capsys.readouterr().out
    assert run_check(tmp_path, json=True) == 1
    assert "expected a model directory" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("seed", range(3))
def test_plain_slots_are_those_of_the_hash_under_every_rule(tiny_engram: HouseModel, seed: int) -> None:
    """The one-by-one definition and the vectorised hash agree, with resets and with engram-peft's windows."""
    site = sites_of(tiny_engram)[0]
    tokens = torch.randint(3, 200, (3, 11), generator=torch.Generator().manual_seed(seed))
    tokens[:, 4] = tokens[:, 0]
    eos = int(site.vocabulary.token_map[int(tokens[0, 0])])
    for change in ({}, {"boundary": "reset", "eos": eos}, {"window_rule": "engram_peft_1_2"}):
        ngram_hash = replace(site.engram.ngram_hash, _constants={}, **change)
        changed: EngramSite = replace(site, **change)
        assert np.array_equal(plain_slots(changed, tokens.numpy()), ngram_hash.slots(tokens).numpy())


def recording(model: HouseModel) -> dict[str, np.ndarray]:
    logits, cache = model.run_with_cache(TOKENS)
    arrays = {"input_ids": TOKENS, "logits": logits}
    for site in sites_of(model):
        hook = lambda name, block=site.block: cache[f"blocks.{block}.engram.hook_{name}"]  # noqa: E731
        arrays |= {f"L{site.block}.hash_ids": hook("slots"), f"L{site.block}.gate": hook("gate").unsqueeze(-1)}
        arrays[f"L{site.block}.primes"] = torch.tensor(site.primes)
    return {name: value.numpy().copy() for name, value in arrays.items()}


def test_a_recording_is_compared_whole(tiny_engram: HouseModel, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arrays, path = recording(tiny_engram), tmp_path / "recorded.npz"
    np.savez(path, **arrays)
    assert run_check(tiny_engram, recorded=path) == 0
    assert capsys.readouterr().out.count("recorded ") == len(arrays) - 1

    def wrong(name: str, index: tuple[int, ...], by: float) -> list[str]:
        changed = {key: value.copy() for key, value in arrays.items()}
        changed[name][index] += by
        np.savez(path, **changed)
        return [row.line for row in recorded_rows(tiny_engram, path) if not row.ok]

    assert wrong("L3.gate", (0, 2, 1, 0), 5e-5) == []
    for name, index, by in (
        ("L3.gate", (0, 2, 1, 0), 2e-4),
        ("L1.hash_ids", (0, 5, 7), 1),
        ("L1.primes", (1, 2), 1),
        ("logits", (0, 0, 9), float("nan")),
    ):
        (line,) = wrong(name, index, by)
        assert line.startswith(f"WRONG recorded {name}: ")
        assert f"at {list(index)}: " in line
    np.savez(path, **arrays, **{"L1.mystery": np.zeros(3)})
    assert [row.check for row in recorded_rows(tiny_engram, path) if not row.ok] == ["recorded L1.mystery"]
    assert run_check(tiny_engram, recorded=path) == 1
    assert "not compared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "input_ids"),
        ({"input_ids": np.zeros((1, 3))}, "expected integers"),
        ({"input_ids": np.ones((1, 3), int), "L0.gate": np.zeros(1)}, "memories in blocks"),
        ({"input_ids": np.array([[10**9]]), "L1.gate": np.zeros(1)}, "expected token ids in"),
        ({"input_ids": np.array([[{}]], dtype=object)}, "without pickled objects"),
    ],
)
def test_an_unusable_recording_is_one_clear_error(
    tiny_engram: HouseModel, tmp_path: Path, capsys: pytest.CaptureFixture, arrays: dict, message: str
) -> None:
    np.savez(tmp_path / "recorded.npz", **arrays)
    assert run_check(tiny_engram, recorded=tmp_path / "recorded.npz") == 1
    out = capsys.readouterr().out
    assert out.startswith("error: ")
    assert message in out


def test_worst_element_counts_nan_and_large_integers() -> None:
    assert worst_element(np.array([1.0, np.nan]), np.array([1.0, 2.0])) == (np.inf, (1,))
    assert worst_element(np.array([2**62]), np.array([2**62 + 1])) == (1.0, (0,))
    assert worst_element(np.zeros((0, 2)), np.zeros((0, 2))) == (0.0, ())
