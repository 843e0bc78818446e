"""`engram-interp cka ENGRAM BASELINE` and `cka --from-heatmap FILE`: the similarity probe from a terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

from engram_interp.measure.alignment import PAPER_K
from engram_interp.runs.result_files import write_form

Positions = Literal["entity_final", "one_per_document", "all"]


def run_cka(
    engram: str,
    baseline: str,
    *,
    texts: Path | None = None,
    control: str | None = None,
    positions: Positions | None = None,
    k: int = PAPER_K,
    permutations: int = 100,
    seed: int = 0,
    base: Path | None = None,
    as_json: bool = False,
    out: Path | None = None,
) -> int:
    """Compare two models on the texts of a file (one per line, or .jsonl), or on the bundled gallery, whose entities are marked.

    Args: positions: by default `entity_final` on the gallery and `one_per_document` on a file; base: the base model of the
        engram-peft adapters among the models; out: write the result here too (`.json`, `.html` for the figure, `.csv`
        for the cells).
    Raises: ValueError for an empty text file, `entity_final` on plain texts, a memory without its backbone, or whatever
        `cka_heatmap` refuses.
    """
    from engram_interp.gallery import load_gallery
    from engram_interp.models.adapters.opening import open_decoders
    from engram_interp.probes.similarity import cka_heatmap

    _require_suffix(out)
    lines = load_gallery() if texts is None else _lines(texts)
    if texts is not None and positions == "entity_final":
        raise ValueError("a plain text file marks no entities: use positions one_per_document or all, or the gallery")
    positions = positions or ("entity_final" if texts is None else "one_per_document")
    names = [engram, baseline] if control is None else [engram, baseline, control]
    first, second, *rest = open_decoders(*names, base=base)
    other = rest[0] if rest else None
    result = cka_heatmap(first, second, lines, positions, control=other, k=k, permutations=permutations, seed=seed)
    summary = [f"CKA of {result.matrix.n} rows, {result.matrix.documents} documents, {positions}"]
    summary += [result.depths().to_string(index=False, float_format="%.2f")]
    summary += [claim.sentence for claim in result.claims] + [f"warning: {w}" for w in result.warnings]
    return _emit(result, summary, as_json, out)


def run_from_heatmap(path: Path, k: int = PAPER_K, *, as_json: bool = False, out: Path | None = None) -> int:
    """Soft alignment of a stored heat map.

    Raises: ValueError as `from_heatmap_file`.
    """
    from engram_interp.probes.heatmap_file import from_heatmap_file

    _require_suffix(out)
    result = from_heatmap_file(path, k)
    summary = [result.table().to_string(index=False, float_format="%.2f"), *(f"note: {w}" for w in result.warnings)]
    return _emit(result, summary, as_json, out)


def _lines(path: Path) -> list[str]:
    from engram_interp.gallery.files import read_texts

    lines = list(read_texts(path))
    if not lines:
        raise ValueError(f"expected at least one text in {path.name}, found an empty file")
    return lines


def _require_suffix(out: Path | None) -> None:
    if out is not None and out.suffix not in (".json", ".html", ".csv"):
        raise ValueError(f"expected --out to end in .json, .html or .csv, found {out.name!r}")


def _emit(result, summary: list[str], as_json: bool, out: Path | None) -> int:  # noqa: ANN001 - either result
    if out is not None:
        forms = {
            ".json": lambda: json.dumps(result.as_dict(), allow_nan=False),
            ".html": lambda: result.figure().to_html(include_plotlyjs=True),
            ".csv": lambda: result.table().to_csv(index=False),
        }
        write_form(out, forms)
    text = json.dumps(result.as_dict(), allow_nan=False) if as_json else "\n".join(summary)
    sys.stdout.write(text + "\n")
    return 0
