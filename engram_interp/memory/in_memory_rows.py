"""The rows of a weight that is loaded already; apart from `row_reader`, so that reading files needs no torch."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from engram_interp.memory.row_reader import check_indices


class InMemoryRows:
    """The rows of a loaded weight. The tensor is not copied: later changes to it are read."""

    def __init__(self, weight: Float[Tensor, "rows width"], name: str = "table") -> None:
        self._weight = weight.detach()
        self.rows, self.width = weight.shape
        self.name = name

    def read(self, indices: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, "n width"]:
        """See `RowReader.read`."""
        check_indices(indices, self.rows, self.name)
        chosen = torch.from_numpy(np.ascontiguousarray(indices)).to(self._weight.device)
        return self._weight.index_select(0, chosen).float().cpu().numpy()
