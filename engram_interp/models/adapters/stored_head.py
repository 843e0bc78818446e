"""Which tokens would a vector promote, in a model too large to load?

The unembedding of a checkpoint is read a chunk of rows at a time and multiplied as it goes by: logits[v] = W_U[v] . x.
Cost: one pass over the V rows. Misleads: no final norm is applied, as in `Decoder.unembed`; the vector is taken as
ready for the head.
"""

from __future__ import annotations

import re

import torch

from engram_interp.memory.row_reader import RowReader, TableError, chunks
from engram_interp.memory.safetensors_rows import SafetensorsRows
from engram_interp.models.adapters.tensors import FLOATS, AdapterError, TensorFiles
from engram_interp.shapes import Float, Tensor

# Names in published checkpoints; the embedding where head and embedding are one tensor. `mtp.` is another model's.
_NAMES = (
    re.compile(r"^(?!mtp\.)(.*\.)?(lm_head|head)\.weight$"),
    re.compile(r"^(?!mtp\.)(.*\.)?embed(_tokens)?\.weight$"),
)


class StoredHead:
    """The rows of an unembedding that stays in its file.

    Raises: AdapterError when they are not [at least `tokens`, `width`].
    """

    def __init__(self, rows: RowReader, tokens: int, width: int) -> None:
        if rows.rows < tokens or rows.width != width:
            raise AdapterError(f"{rows.name}: expected at least [{tokens}, {width}], found [{rows.rows}, {rows.width}]")
        self.rows, self.tokens = rows, tokens

    def __call__(self, hidden: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        """Logits of the tokens the tokenizer knows; a padded vocabulary has more rows."""
        pieces = [hidden @ torch.from_numpy(rows).T for _, rows in chunks(self.rows, 0, self.tokens)]
        return torch.cat(pieces, dim=-1)


def open_stored_head(files: TensorFiles, tokens: int, width: int) -> StoredHead:
    """The unembedding of a safetensors checkpoint.

    Args: tokens: V as the tokenizer has it; width: D.
    Raises: AdapterError when it is missing (with the name of its shard), of a quantised type, or misshaped.
    """
    found = [[name for name in files.names if pattern.match(name) and "engram" not in name] for pattern in _NAMES]
    names = found[0] or found[1]
    if len(names) != 1:
        raise AdapterError(f"{files.path}: expected one unembedding (lm_head.weight or head.weight), found {names[:3]}")
    try:
        return StoredHead(SafetensorsRows(files.entry(names[0], FLOATS)), tokens, width)
    except TableError as error:
        raise AdapterError(str(error)) from None
