"""How do the processes that torchrun started act as one?

Each has its rank from torchrun's environment; without it there is one process and nothing to start. Statistics meet in
`sum_rows`, in which every row belongs to one rank and is zero in all others, so that the sum is exact and its order cannot
matter. Backend: gloo on a CPU, nccl on CUDA (not run on a GPU). A rank that dies takes the run down: torchrun stops the others,
and each says so in one line.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import distributed

from engram_interp.shapes import Float, Tensor

_PATIENCE = timedelta(
    days=7
)  # ranks with little to do wait for the others; a dead one is noticed by torchrun, not by this


class StoppedError(OSError):
    """This process was told to stop, or another process of the run is gone."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable

    def wait(self) -> None:
        """Until all are here.

        Raises: StoppedError when another is gone.
        """
        self.sum_rows(torch.zeros(1, 1, dtype=torch.float64))

    def sum_rows(self, rows: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """The rows of all processes, where each row is zero in all but one.

        Raises: StoppedError when another is gone.
        """
        if self.size == 1:
            return rows
        found = rows.to(self.device)
        try:
            distributed.all_reduce(found)
        except RuntimeError as error:
            raise StoppedError(f"another process is gone ({str(error).splitlines()[0]})") from None
        return found.cpu()


@contextmanager
def joined_processes(device: str = "cpu") -> Iterator[Processes]:
    """Join the processes torchrun started.

    Args: device: "cpu" or "cuda"; with cuda every process takes the GPU of its local rank.
    Raises: ValueError for another device, or CUDA that is not there; inside, StoppedError when told to stop.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"expected device cpu or cuda, found {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("expected a CUDA device for device cuda, found none")
    local = torch.device("cpu") if device == "cpu" else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Processes(device=local)
        return
    before = signal.signal(signal.SIGTERM, _stop)
    distributed.init_process_group("gloo" if device == "cpu" else "nccl", timeout=_PATIENCE)
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), local)
    finally:
        signal.signal(signal.SIGTERM, before)
        distributed.destroy_process_group()


def _stop(*_: Any) -> NoReturn:
    raise StoppedError("told to stop, because another process is gone or the run was cancelled")
