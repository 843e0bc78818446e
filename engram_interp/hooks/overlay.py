"""How is a fact changed without touching the checkpoint?

An overlay is a small file of table rows: at run time they are read instead of the table's own. It names the weights it
was made for (SHA-256) and is refused by any other model, because row numbers mean nothing elsewhere.

File: safetensors with `blocks.{i}.rows` int64 [n] and `blocks.{i}.values` float32 [n, head]; metadata are plain
strings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engram_interp.hooks.site import Hook, Site, capture
from engram_interp.models.protocol import MemoryModel
from engram_interp.runs.atomic import write_atomically
from engram_interp.shapes import Float, Int64, Tensor

FORMAT = "engram_interp overlay 1"


class OverlayError(ValueError):
    """An overlay that cannot be read or applied; the message names what was expected and what was found."""


@dataclass(frozen=True, eq=False)
class RowEdit:
    """New values of some rows of one memory's flat table; `rows` ascend and differ."""

    rows: Int64[Tensor, " n"]
    values: Float[Tensor, "n head"]


@dataclass(frozen=True, eq=False)
class Overlay:
    """Edited rows by block, the model they belong to, and what they are meant to do (`about`: strings only)."""

    edits: Mapping[int, RowEdit]
    weights_sha256: str
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Edited rows in all blocks."""
        return sum(len(edit.rows) for edit in self.edits.values())


@contextmanager
def apply_overlay(model: MemoryModel, overlay: Overlay) -> Iterator[MemoryModel]:
    """Read the overlay's rows instead of the table's inside a `with`; nest several, the innermost wins on a shared row.

    Raises: OverlayError when it was made for other weights, or a block, row or width does not fit.
    """
    if overlay.weights_sha256 != model.identity.weights_sha256:
        raise OverlayError(
            f"the overlay was made for weights {overlay.weights_sha256[:12] or 'unknown'}, "
            f"{model.identity.name!r} has {model.identity.weights_sha256[:12] or 'unsaved weights'}"
        )
    for block, edit in overlay.edits.items():
        _check(model, block, edit)
    with model.hooks([hook for block, edit in overlay.edits.items() for hook in edit_hooks(Site(model, block), edit)]):
        yield model


def edit_hooks(site: Site, edit: RowEdit) -> list[Hook]:
    """Hooks that replace rows on their way out of the table; differentiable in `edit.values`."""
    seen: dict[str, Tensor] = {}
    ngram_hash = site.memory.ngram_hash  # type: ignore[attr-defined]

    def replace(embedding: Tensor, hook: object) -> Tensor:
        read = ngram_hash.rows_of_slots(seen.pop("slots"))
        edited = edit.rows.to(read.device)
        index = torch.searchsorted(edited, read).clamp_max(len(edited) - 1)
        hit = (edited[index] == read).unsqueeze(-1)
        rows = embedding.unflatten(-1, (read.shape[-1], -1))
        return torch.where(hit, edit.values.to(rows)[index], rows).flatten(-2)

    return [(site.inside("slots"), capture(seen, "slots")), (site.inside("embedding"), replace)]


def _check(model: MemoryModel, block: int, edit: RowEdit) -> None:
    if block not in model.engram_layers:
        raise OverlayError(f"the overlay edits block {block}; memories are in blocks {list(model.engram_layers)}")
    count, width = model.engram(block).table.weight.shape  # type: ignore[attr-defined]
    ascending = bool((edit.rows[1:] > edit.rows[:-1]).all())
    if not len(edit.rows) or not ascending or int(edit.rows[0]) < 0 or int(edit.rows[-1]) >= count:
        raise OverlayError(
            f"block {block}: expected distinct ascending rows in [0, {count}), found {edit.rows[:4].tolist()}"
        )
    if edit.values.shape != (len(edit.rows), width) or not edit.values.isfinite().all():
        raise OverlayError(
            f"block {block}: expected finite values [{len(edit.rows)}, {width}], found {list(edit.values.shape)}"
        )


def overlay_tensors(overlay: Overlay) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of an overlay's file."""
    tensors: dict[str, Tensor] = {}
    for block, edit in overlay.edits.items():
        tensors[f"blocks.{block}.rows"] = edit.rows.contiguous()
        tensors[f"blocks.{block}.values"] = edit.values.detach().float().contiguous()
    about = {f"about.{key}": value for key, value in overlay.about.items()}
    return tensors, {"format": FORMAT, "weights_sha256": overlay.weights_sha256, **about}


def save_overlay(overlay: Overlay, path: Path) -> None:
    """Write an overlay file, atomically."""
    from safetensors.torch import save_file

    tensors, metadata = overlay_tensors(overlay)
    write_atomically(path, lambda part: save_file(tensors, part, metadata))


def load_overlay(path: Path) -> Overlay:
    """Read an overlay file.

    Raises: OverlayError for a missing, damaged or foreign file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise OverlayError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise OverlayError(f"{path}: damaged or not safetensors ({error})") from None
    if metadata.get("format") != FORMAT:
        raise OverlayError(f"{path}: expected format {FORMAT!r}, found {metadata.get('format')!r}")
    blocks = sorted({int(m[1]) for name in tensors if (m := re.fullmatch(r"blocks\.(\d+)\.(?:rows|values)", name))})
    expected = {f"blocks.{b}.{part}" for b in blocks for part in ("rows", "values")}
    if not blocks or set(tensors) != expected:
        raise OverlayError(f"{path}: expected rows and values of each block, found {sorted(tensors)[:4]}")
    edits = {b: RowEdit(tensors[f"blocks.{b}.rows"].long(), tensors[f"blocks.{b}.values"].float()) for b in blocks}
    about = {key.removeprefix("about."): value for key, value in metadata.items() if key.startswith("about.")}
    return Overlay(edits, metadata.get("weights_sha256", ""), about)
