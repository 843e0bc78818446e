"""Does this model's memory do what it claims? One self-check for the house model and every adapter.

Per site: shapes; hash constants as used against those regenerated from the configuration and those stored; rows of
the table; finite rows (a sample of a large table); slots recomputed one by one in exact integers; embeddings, keys,
values, gates and the write recomputed in float64 from captured inputs; the n-gram window (changing x[t-j] changes
exactly the heads whose window holds t-j) and causality. Per model: recording changes nothing, and the exit path is
the model's own. Cost: about ten short forwards and `SAMPLE` rows. Misleads: it proves consistency, not that the
weights are the ones somebody trained; the input of a memory without a model around it is random.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from engram_interp.models.check_recorded import recorded_rows
from engram_interp.models.check_report import CheckReport, CheckRow, say_error, worst_element
from engram_interp.models.protocol import ModelIdentity
from engram_interp.models.site import EngramSite, sites_of
from engram_interp.runs import Provenance
from engram_interp.shapes import Float, Int64, Tensor

SAMPLE = 4096  # rows looked at in a table larger than twice that
TOLERANCE = 1e-4
_ROUNDING = 1e-5  # a share of the largest value: what another order of float32 sums may move
_SEED = 20
_ALTERNATIVES = 6  # tokens tried in the window check: a head of p rows misses a change with probability p^-6


def run_check(
    model: object, *, recorded: str | Path | None = None, base: str | Path | None = None, json: bool = False
) -> int:
    """Print one line per check, or the report as JSON; 0 when all hold, else 1.

    Args: recorded: an `.npz` of quantities recorded by the program the model comes from, compared as well.
    """
    try:
        report = check_model(model, base=base, recorded=recorded)
    except (ValueError, OSError) as error:
        return say_error(error, json=json)
    return report.say(json=json)


@torch.no_grad()
def check_model(model: object, *, base: str | Path | None = None, recorded: str | Path | None = None) -> CheckReport:
    """Check a model with a memory.

    Args: model: an opened model, a bundled name, or a directory; base: the base model's directory for an adapter;
        recorded: an `.npz` to compare with, see `engram_interp.models.check_recorded`.
    Raises: ValueError for something that cannot be opened, or has no memory to check.
    """
    model = opened(model, base)
    sites = sites_of(model)
    identity: ModelIdentity = model.identity  # type: ignore[attr-defined]
    if not sites:
        raise ValueError(f"{identity.name}: expected a model with a memory, found none to check")
    runner = _Runner(model, sites)
    rows = [row for site in sites for row in _site_rows(runner, site)]
    if runner.whole:
        rows += _model_rows(runner)
    if recorded is not None:
        rows += recorded_rows(model, Path(recorded))
    provenance = Provenance({identity.name: identity.weights_sha256}, "", 0, {"seed": _SEED, "sample": SAMPLE})
    return CheckReport(identity.name, tuple(rows), provenance)


def opened(model: object, base: str | Path | None = None) -> object:
    """The model itself, or the one of that name or directory."""
    if not isinstance(model, str | Path):
        return model
    from engram_interp.models.adapters.opening import open_model

    return open_model(model, base=base)


# -- running ---------------------------------------------------------------------------------------------------------


class _Runner:
    """Runs a model, or a memory without one, on chosen tokens and captures what goes in and out of a site."""

    def __init__(self, model: object, sites: tuple[EngramSite, ...]) -> None:
        self.model = model
        self.whole = hasattr(model, "exit_hidden")
        self.rng = np.random.default_rng(_SEED)
        self.generator = torch.Generator().manual_seed(_SEED)
        self.choices = _ordinary_tokens(sites[0], getattr(model, "vocab_size", None))

    def tokens(self, texts: int, length: int) -> Int64[Tensor, "B T"]:
        """Random ordinary tokens."""
        return torch.from_numpy(self.rng.choice(self.choices, size=(texts, length)))

    def capture(self, site: EngramSite, tokens: Int64[Tensor, "B T"]) -> dict[str, Tensor]:
        """By short hook name, every record of a site; `resid_pre` is what goes into it."""
        names = [f"blocks.{site.block}.hook_*", f"blocks.{site.block}.engram.*"]
        if self.whole:
            _, cache = self.model.run_with_cache(tokens, names)  # type: ignore[attr-defined]
        else:
            shape = (1, tokens.shape[1], site.branches, site.width)  # the same for every text
            hidden = torch.randn(shape, generator=self.generator).expand(len(tokens), -1, -1, -1)
            _, cache = self.model.run_with_cache(tokens, {site.block: hidden}, names)  # type: ignore[attr-defined]
        return {name.rpartition("hook_")[2]: value for name, value in cache.items()}


def _ordinary_tokens(site: EngramSite, vocab_size: int | None) -> np.ndarray:
    """Raw ids of distinct compressed ids that are neither padding nor an end of text: one each."""
    compressed, first = np.unique(site.vocabulary.token_map, return_index=True)
    special = {site.pad, site.eos}
    model_size = site.vocabulary.raw_size if vocab_size is None else vocab_size
    keep = [int(f) for c, f in zip(compressed, first, strict=True) if int(c) not in special and f < model_size]
    if len(keep) < 2:
        raise ValueError(f"expected at least 2 distinct ordinary tokens to check with, found {len(keep)}")
    return np.array(keep, dtype=np.int64)


# -- one site --------------------------------------------------------------------------------------------------------


def _site_rows(runner: _Runner, site: EngramSite) -> Iterator[CheckRow]:
    name = f"blocks.{site.block}"
    yield from _shape_rows(name, site)
    yield from _constant_rows(name, site)
    yield _finite_row(name, runner, site)
    tokens = runner.tokens(2, 12)
    if site.eos is not None:
        tokens[1, 5] = int(np.flatnonzero(site.vocabulary.token_map == site.eos)[0])  # a boundary inside a text
    found = runner.capture(site, tokens)
    slots = plain_slots(site, tokens.numpy())
    yield _row(
        f"{name} slots", "those of the definition, in exact integers", *_integers_agree(slots, found["slots"].numpy())
    )
    yield from _recomputed_rows(name, site, found)
    yield _window_row(name, runner, site)
    yield _causal_row(name, runner, site)


def _row(check: str, expected: str, ok: bool, found: str) -> CheckRow:
    return CheckRow(check, expected, found, bool(ok))


def _shape_rows(name: str, site: EngramSite) -> Iterator[CheckRow]:
    mem, m, d = site.slots * site.head_width, site.branches, site.width
    pairs = {
        "row width": (site.head_width, site.rows.width),
        "value projection": ((d, mem), tuple(site.value.weight.shape)),
        "key projections": ([(d, mem)] * m, [tuple(key.weight.shape) for key in site.keys]),
        "norm gains": ([(m, d)] * 2, [tuple(gain.shape) for gain in (site.key_gain, site.query_gain)]),
    }
    if site.conv is not None:
        pairs["convolution"] = ((m, d), tuple(site.conv.taps.shape[:2]))
    for what, (expected, found) in pairs.items():
        yield _row(f"{name} shape of {what}", str(expected), expected == found, str(found))


def _constant_rows(name: str, site: EngramSite) -> Iterator[CheckRow]:
    for what in ("multipliers", "primes", "offsets", "rows"):
        used, regenerated = getattr(site.used, what), getattr(site.regenerated, what)
        yield _row(f"{name} {what}", f"{_short(regenerated)} regenerated", used == regenerated, _short(used))
        stored = getattr(site.stored, what)
        if stored is not None:
            yield _row(f"{name} {what} stored", _short(used), used == stored, _short(stored))


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:60]} ... {text[-30:]}"


def _finite_row(name: str, runner: _Runner, site: EngramSite) -> CheckRow:
    rows = site.rows.rows
    if rows <= 2 * SAMPLE:
        chosen = np.arange(rows, dtype=np.int64)
    else:
        chosen = np.unique(np.concatenate([[0, rows - 1], runner.rng.integers(0, rows, SAMPLE)])).astype(np.int64)
    values = site.rows.read(chosen)
    bad = chosen[~np.isfinite(values).all(axis=1)]
    found = f"{len(chosen)} of {rows} rows read, " + (f"row {bad[0]} is not finite" if len(bad) else "all finite")
    return _row(f"{name} finite rows", "finite rows", not len(bad), found)


def plain_slots(site: EngramSite, tokens: Int64[np.ndarray, "B T"]) -> Int64[np.ndarray, "B T S"]:
    """The address of every slot by the definition, one at a time in Python's integers."""
    window = len(site.multipliers) - 1
    slots = np.empty((*tokens.shape, site.slots), dtype=np.int64)
    for b, row in enumerate(site.vocabulary.token_map[tokens].tolist()):
        for t in range(len(row)):
            slots[b, t] = [mix % prime for mix, primes in zip(_mixes(site, row, t, window), site.primes, strict=True)
                           for prime in primes]  # fmt: skip
    return slots


def _mixes(site: EngramSite, text: list[int], t: int, window: int) -> Iterator[int]:
    mix = 0
    for index, multiplier in enumerate(site.multipliers):
        lag = index if site.window_rule == "aligned" else window - index
        source = t - lag
        crossed = source < 0 or (site.boundary == "reset" and site.eos in text[source:t])
        mix ^= (site.pad if crossed else text[source]) * multiplier
        if index:
            yield mix


def _integers_agree(expected: np.ndarray, found: np.ndarray) -> tuple[bool, str]:
    if expected.shape != found.shape:
        return False, f"shape {found.shape} instead of {expected.shape}"
    wrong = np.argwhere(expected != found)
    if not len(wrong):
        return True, f"{expected.size} equal"
    first = tuple(int(i) for i in wrong[0])
    return False, f"{len(wrong)} differ, the first at {list(first)}: {found[first]} instead of {expected[first]}"


def _recomputed_rows(name: str, site: EngramSite, found: Mapping[str, Tensor]) -> Iterator[CheckRow]:
    slots = found["slots"].numpy()
    rows = site.rows.read((slots + np.array(site.offsets)).reshape(-1))
    hidden = _f64(found["resid_pre"])
    if hidden.shape[2] != site.branches:
        hidden = np.broadcast_to(hidden, (*hidden.shape[:2], site.branches, site.width))
    expected = recompute(site, rows.reshape(*slots.shape[:2], -1), hidden)
    for what in ("embedding", "key", "value", "gate", "gated_value", "engram_out"):
        actual = _f64(found[what])
        scale = max(1.0, float(np.abs(expected[what]).max()))
        worst, index = worst_element(expected[what], actual)
        values = f"{actual[index]:.6g} for {expected[what][index]:.6g}"
        text = f"worst difference {worst / scale:.2g} at {list(index)}: {values}"
        yield _row(
            f"{name} {what} recomputed", f"within {TOLERANCE:g} of the definition", worst / scale <= TOLERANCE, text
        )


def recompute(
    site: EngramSite, embedding: Float[np.ndarray, "B T mem"], hidden: Float[np.ndarray, "B T M D"]
) -> dict[str, np.ndarray]:
    """The layer by its equations in float64, from the record alone."""
    e = embedding.astype(np.float64)
    eps = torch.finfo(site.value.weight.dtype).eps if site.gate_eps is None else site.gate_eps
    value = e @ _f64(site.value.weight).T + (0 if site.value.bias is None else _f64(site.value.bias))
    key = np.stack([e @ _f64(k.weight).T + (0 if k.bias is None else _f64(k.bias)) for k in site.keys], axis=2)
    agreement = _rms(key, eps) * _f64(site.key_gain) * _rms(hidden, eps) * _f64(site.query_gain)
    score = agreement.sum(-1) / math.sqrt(site.width)
    if site.gate != "plain":
        sign = np.sign(score) if site.gate == "signed_root" else np.copysign(1.0, score)
        score = sign * np.sqrt(np.maximum(np.abs(score), 1e-6))
    gate = 1 / (1 + np.exp(-score))
    gated = gate[..., None] * value[:, :, None]
    out = gated if site.conv is None else gated + _convolve(site, gated)
    if site.streams < site.branches:
        out = out.sum(axis=2, keepdims=True)
    return {"embedding": e, "key": key, "value": value, "gate": gate, "gated_value": gated, "engram_out": out}


def _convolve(site: EngramSite, gated: Float[np.ndarray, "B T M D"]) -> Float[np.ndarray, "B T M D"]:
    conv = site.conv
    normed, taps = _rms(gated, conv.eps) * _f64(conv.gain), _f64(conv.taps)  # type: ignore[union-attr]
    total, length = np.zeros_like(gated), gated.shape[1]
    for tap in range(taps.shape[-1]):
        back = (taps.shape[-1] - 1 - tap) * conv.dilation  # type: ignore[union-attr]
        if back < length:
            total[:, back:] += normed[:, : length - back] * taps[..., tap]
    return total / (1 + np.exp(-total))


def _rms(x: Float[np.ndarray, "*any D"], eps: float) -> Float[np.ndarray, "*any D"]:
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps)


def _f64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def _window_row(name: str, runner: _Runner, site: EngramSite) -> CheckRow:
    """Which orders at position t see a change of the token j places back, for every j up to one beyond the window."""
    reach = len(site.multipliers)
    t = reach
    base = runner.tokens(1, reach + 1)
    heads = np.repeat(site.orders, site.heads)
    expected: dict[int, object] = {}
    found: dict[int, object] = {}
    for lag in range(reach + 1):
        others = runner.rng.permutation(runner.choices[runner.choices != int(base[0, t - lag])])[:_ALTERNATIVES]
        texts = base.repeat(len(others) + 1, 1)
        texts[1:, t - lag] = torch.from_numpy(others)
        slots = runner.capture(site, texts)["slots"][:, t].numpy()
        changed = (slots[1:] != slots[0]).any(axis=0)
        orders = [order for order in site.orders if lag in site.lags(order)]
        expected[lag] = orders
        found[lag] = sorted({int(order) for order in heads[changed]})
        if found[lag] == orders and changed.sum() != site.heads * len(orders):
            found[lag] = f"only {int(changed.sum())} heads"
    return _row(f"{name} n-gram window", f"orders changed by lag {expected}", found == expected, f"{found}")


def _causal_row(name: str, runner: _Runner, site: EngramSite) -> CheckRow:
    tokens = runner.tokens(2, 10)
    tokens[1] = tokens[0]
    tokens[1, -1] = int(runner.rng.choice(runner.choices[runner.choices != int(tokens[0, -1])]))
    out = runner.capture(site, tokens)["engram_out"]
    leak = _moved(out[0, :-1], out[1, :-1])
    expected = "earlier writes unmoved by a later token"
    return _row(f"{name} causality", expected, leak <= _ROUNDING, f"moved by {leak:.2g} of their size")


def _moved(before: Tensor, after: Tensor) -> float:
    """The largest change, as a share of the largest value (float32 rounds in proportion)."""
    return float((after - before).abs().max() / before.abs().max().clamp_min(1e-30))


# -- the whole model -------------------------------------------------------------------------------------------------


def _model_rows(runner: _Runner) -> Iterator[CheckRow]:
    model = runner.model
    tokens = runner.tokens(2, 10)
    logits = model(tokens)  # type: ignore[operator]
    recorded = model.run_with_cache(tokens)[0]  # type: ignore[attr-defined]
    same = torch.equal(logits, recorded)
    yield _row("recording", "logits equal bit for bit", same, "equal" if same else "different logits")
    exit_logits = model.unembed(model.exit_hidden(model.residuals(tokens)[-1]))  # type: ignore[attr-defined]
    worst = float((exit_logits - logits).abs().max())
    yield _row(
        "exit path", "logits equal bit for bit", torch.equal(exit_logits, logits), f"worst difference {worst:.2g}"
    )
    changed = tokens.clone()
    changed[:, -1] = torch.where(
        tokens[:, -1] == int(runner.choices[0]), int(runner.choices[1]), int(runner.choices[0])
    )
    leak = _moved(logits[:, :-1], model(changed)[:, :-1])  # type: ignore[operator]
    expected = "earlier logits unmoved by the last token"
    yield _row("causality", expected, leak <= _ROUNDING, f"moved by {leak:.2g} of their size")
    finite = bool(torch.isfinite(logits).all())
    yield _row("logits", "finite", finite, "all finite" if finite else "not finite")
