"""What does the soft alignment say about a heat map from elsewhere?

Reads `{"cka": [[...]], "rows": [...], "columns": [...]}` (rows = baseline layers, columns = Engram layers; labels
optional, as the `cka --json` of this project writes it) or a bare list of lists. If the file also has `"control":
[[...]]`, baseline against another seed of it, the null is computed from that; a heat map alone has no null, and the
result says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from engram_interp.measure.alignment import PAPER_K, calibrated_depth, parabola_argmax, soft_alignment

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class HeatmapAlignment:
    """The paper's index (0-based row numbers) for every column of a heat map; its null if the file had a control."""

    k: int
    cka: Float[np.ndarray, "rows columns"]
    rows: tuple[int | str, ...]
    columns: tuple[int | str, ...]
    index: Float[np.ndarray, " columns"]
    null: Float[np.ndarray, " columns"] | None
    parabola: Float[np.ndarray, " columns"]
    warnings: tuple[str, ...]

    def table(self) -> pd.DataFrame:
        """One row per Engram layer."""
        import pandas as pd

        null = np.full(len(self.index), np.nan) if self.null is None else self.null
        columns = {"soft_alignment": self.index, "null": null, "parabola_argmax": self.parabola}
        return pd.DataFrame({"engram": self.columns, **columns})

    def figure(self) -> go.Figure:
        """The heat map with the index over it."""
        from engram_interp.figures.heatmap import heatmap_figure

        curves = {f"soft alignment, k = {self.k}": self.index} | ({} if self.null is None else {"null": self.null})
        return heatmap_figure(
            self.cka, self.rows, self.columns, curves=curves, title="CKA heat map with soft alignment",
            row_title="baseline layer", column_title="Engram layer",
        )  # fmt: skip

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON; what is undefined is null."""
        calibrated = None if self.null is None else calibrated_depth(self.index, self.null)
        alignment = {"k": self.k, "engram": self.index, "null": self.null, "calibrated": calibrated}
        return plain(
            {
                "rows": self.rows, "columns": self.columns, "cka": self.cka, "soft_alignment": alignment,
                "parabola_argmax": self.parabola, "warnings": self.warnings,
            }
        )  # fmt: skip


def from_heatmap_file(path: Path | str, k: int = PAPER_K) -> HeatmapAlignment:
    """Soft alignment of a stored heat map.

    Raises: ValueError for a file without a rectangular, finite heat map, labels or a control that do not fit, or k
        larger than the number of rows.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"expected JSON in {path.name}, found {error}") from error
    if isinstance(content, list):
        content = {"cka": content}
    if not isinstance(content, Mapping) or "cka" not in content:
        keys = sorted(content) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"expected a list of lists, or an object with the key 'cka', in {path.name}, found {keys}")
    values = _matrix(content["cka"], path.name, "cka")
    rows, columns = (
        tuple(content.get(name) or range(size)) for name, size in zip(("rows", "columns"), values.shape, strict=True)
    )
    if (len(rows), len(columns)) != values.shape:
        raise ValueError(
            f"expected labels for {values.shape} values, found {len(rows)} rows and {len(columns)} columns"
        )
    index, null = soft_alignment(values, k), None
    first, last = (k - 1) / 2, len(values) - 1 - (k - 1) / 2
    notes = [f"with k = {k} the index cannot leave {first:g} to {last:g} by much, whatever the models"]
    if content.get("control") is not None:
        control = _matrix(content["control"], path.name, "control")
        if control.shape != values.shape:
            raise ValueError(f"expected a control of shape {values.shape}, found {control.shape}")
        null = soft_alignment(control, k)
    else:
        notes.append(
            "no control heat map (baseline against another seed of it): no null, so nothing may be claimed from it"
        )
    return HeatmapAlignment(k, values, rows, columns, index, null, parabola_argmax(values), tuple(notes))


def plain(value: Any) -> Any:
    """Plain data for JSON: arrays become lists, what is not finite becomes None."""
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _matrix(values: object, file: str, key: str) -> np.ndarray:
    try:
        matrix = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected a rectangular list of numbers under {key!r} in {file}, found {error}") from error
    if matrix.ndim != 2:
        raise ValueError(f"expected rows and columns under {key!r} in {file}, found {matrix.ndim} dimensions")
    return matrix
