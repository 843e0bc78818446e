"""Does an opened model compute what the program it comes from recorded?

A recording is an `.npz` with `input_ids` [B, T], perhaps `logits` and `token_map`, and per memory
`L{block}.{quantity}`: `multipliers`, `primes`, `offsets`, `hash_ids` (rows of the flat table or slots of a head, as
the program numbers them), `gate` [B, T, M], `hidden_in` and `hidden_out` [B, T, M, D] around the memory, `output`
(its write alone), and any hook's short name. Integers must be equal, the rest within 1e-4; the worst element is
named. A quantity that is not known is not passed over: it counts as wrong. Misleads: near a score of zero the gate's
slope is unbounded, so float32 noise can exceed the bound there.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformer_lens import ActivationCache

from engram_interp.models.check_report import CheckRow, worst_element
from engram_interp.models.site import EngramSite, sites_of
from engram_interp.shapes import Float, Int64, Shaped, Tensor

TOLERANCE = 1e-4
_LAYER = re.compile(r"^L(\d+)\.(.+)$")
_HOOKS = ("slots", "embedding", "key", "value", "score", "gate", "gated_value", "conv_out")

Array = Shaped[np.ndarray, "..."]


class RecordingError(ValueError):
    """A recording that cannot be compared; the message names what was expected and what was found."""


@torch.no_grad()
def recorded_rows(model: object, path: Path) -> list[CheckRow]:
    """One row per recorded quantity.

    Raises: RecordingError for a file that is not a readable recording, or belongs to other memories.
    """
    arrays = read_recording(path)
    tokens = recorded_tokens(arrays, path)
    sites = {site.block: site for site in sites_of(model)}
    rows, by_block = [], _by_block(arrays, path, sites)
    found_logits, captured = _run(model, tokens, {block: sites[block] for block in by_block}, arrays)
    for block, quantities in by_block.items():
        computed = _computed(sites[block], captured[block], tokens)
        compared = {name: expected for name, expected in quantities.items() if not _is_input(model, name)}
        rows += [_compare(f"L{block}.{name}", expected, computed.get(name)) for name, expected in compared.items()]
    shared = {"logits": found_logits, "token_map": next(iter(sites.values())).vocabulary.token_map}
    for name in sorted(arrays.keys() - {"input_ids"}):
        if not _LAYER.match(name):
            rows.append(_compare(name, arrays[name], shared.get(name)))
    return rows


def _is_input(model: object, name: str) -> bool:
    """What was given to the memory rather than computed: comparing it with itself would prove nothing."""
    if name == "hidden_in":
        return not hasattr(model, "exit_hidden")
    return name.startswith("state.") and model.identity.kind == "demo"  # type: ignore[attr-defined]


def _run(
    model: object, tokens: Tensor, sites: Mapping[int, EngramSite], arrays: Mapping[str, Array]
) -> tuple[Array | None, dict[int, dict[str, Tensor]]]:
    """Logits (of a whole model) and, by block, every record of the memory."""
    if hasattr(model, "exit_hidden"):
        logits, cache = model.run_with_cache(tokens)  # type: ignore[attr-defined]
        return logits.numpy(), {block: _records(cache, block) for block in sites}
    hidden = {block: recorded_hidden(site, arrays, tokens) for block, site in sites.items()}
    _, cache = model.run_with_cache(tokens, {b: h for b, h in hidden.items() if h is not None})  # type: ignore[attr-defined]
    return None, {block: _records(cache, block) if hidden[block] is not None else {} for block in sites}


def _records(cache: ActivationCache, block: int) -> dict[str, Tensor]:
    head = f"blocks.{block}."
    return {name.rpartition("hook_")[2]: value for name, value in cache.items() if name.startswith(head)}


def recorded_hidden(
    site: EngramSite, arrays: Mapping[str, Array], tokens: Int64[Tensor, "B T"]
) -> Float[Tensor, "B T M D"] | None:
    """The streams before a memory, float32; None when they were not recorded.

    Raises: RecordingError for another shape or type.
    """
    array = arrays.get(f"L{site.block}.hidden_in")
    if array is None:
        return None
    expected, block = (*tokens.shape, site.branches, site.width), site.block
    if array.shape != expected or array.dtype.kind != "f":
        raise RecordingError(
            f"L{block}.hidden_in: expected floats of shape {expected}, found {array.dtype} {array.shape}"
        )
    return torch.from_numpy(array.astype(np.float32))


def _computed(site: EngramSite, captured: Mapping[str, Tensor], tokens: Tensor) -> dict[str, Array]:
    """Our value of everything a recording may hold for a site."""
    ngram_hash = site.engram.ngram_hash
    slots = captured["slots"] if "slots" in captured else ngram_hash.slots(tokens)
    rows = slots + torch.tensor(site.offsets)
    values: dict[str, Tensor] = {name: captured[name] for name in _HOOKS if name in captured}
    values |= {"slots": slots, "rows": rows, "hash_ids": rows if site.numbered_rows else slots}
    if captured:
        out = captured["engram_out"]
        values |= {"output": out, "engram_out": out, "hidden_in": captured["resid_pre"]}
        values["hidden_out"] = captured["resid_pre"] + out
    constants = {"multipliers": site.multipliers, "primes": site.primes, "offsets": site.offsets}
    arrays = {name: np.array(value, dtype=np.int64) for name, value in constants.items()}
    return arrays | {name: value.detach().numpy() for name, value in values.items()}


def _compare(name: str, expected: Array, found: Array | None) -> CheckRow:
    check = f"recorded {name}"
    exact = expected.dtype.kind in "iub"
    wanted = "equal integers" if exact else f"within {TOLERANCE:g}"
    if found is None:
        return CheckRow(check, "a quantity this model can compute", "none of that name, not compared", ok=False)
    if expected.size != found.size or (found.dtype.kind in "iu") != exact:
        text = f"{found.dtype} {list(found.shape)} here, {expected.dtype} {list(expected.shape)} recorded"
        return CheckRow(check, wanted, text, ok=False)
    found = found.reshape(expected.shape)
    worst, index = worst_element(expected, found)
    ok = worst <= (0.0 if exact else TOLERANCE)
    text = f"worst difference {worst:.3g}"
    if not ok:
        text += f" at {list(index)}: {found[index]} here, {expected[index]} recorded"
    return CheckRow(check, wanted, text, ok)


def _by_block(arrays: Mapping[str, Array], path: Path, sites: Mapping[int, EngramSite]) -> dict[int, dict[str, Array]]:
    found: dict[int, dict[str, Array]] = {}
    for name, array in arrays.items():
        if match := _LAYER.match(name):
            found.setdefault(int(match[1]), {})[match[2]] = array
    if set(found) - set(sites) or not found:
        raise RecordingError(f"{path}: expected records of memories in blocks {sorted(sites)}, found {sorted(found)}")
    return found


def recorded_tokens(arrays: Mapping[str, Array], path: Path) -> Int64[Tensor, "B T"]:
    """`input_ids`.

    Raises: RecordingError when they are missing or not integers [B, T].
    """
    ids = arrays.get("input_ids")
    if ids is None or ids.ndim != 2 or ids.dtype.kind not in "iu":
        what = "none" if ids is None else f"{ids.dtype} {list(ids.shape)}"
        raise RecordingError(f"{path}: expected integers [B, T] under 'input_ids', found {what}")
    return torch.from_numpy(ids.astype(np.int64))


def read_recording(path: Path) -> dict[str, Array]:
    """Every array of a recording by name.

    Raises: RecordingError for a file that is not a readable `.npz`, or holds pickled objects.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise RecordingError(f"{path}: not a readable .npz without pickled objects ({error})") from None
