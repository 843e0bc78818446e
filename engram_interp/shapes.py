"""The legend of axis letters, and the array types that carry them.

One letter means one thing in every annotation of this project, always in this order:

| letter | axis | letter | axis |
|---|---|---|---|
| `B` | texts in a batch | `K` | hash heads per order |
| `T` | tokens | `S` | slots per token, `N*K`, order-major |
| `L` | residual sites | `M` | branches (residual streams) |
| `E` | Engram layers | `D` | width of one stream |
| `N` | n-gram orders, 2 first | `V` | vocabulary |

Lower-case words (`mem`, `rows`, `head`) name the remaining sizes where they occur. The annotations are executed in
tests.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int, Int64, Shaped, UInt16
from torch import Tensor

__all__ = ["Bool", "Float", "Int", "Int64", "Shaped", "Tensor", "UInt16"]
