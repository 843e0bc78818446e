"""How are the shards of a study made: one after another, or by several processes at once?

Processes are forked, so each has the model and the plan without loading them again, and take the next shard from one
queue; a shard is the same wherever it is made. One thread each: small products gain nothing from threads that wait for
each other. When a process fails, the others stop after their shard. Misleads: each fits its own statistics once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from tqdm import tqdm

from engram_interp.runs.folder import RunFolder
from engram_interp.runs.manifest import RunError

if TYPE_CHECKING:
    import pandas as pd

_NUMBER = 4  # bytes of a shard's number in the queue


@dataclass(frozen=True)
class Shard:
    """One piece of one or more tables; `make` is deterministic and gives a frame for each of `tables`."""

    tables: tuple[str, ...]
    name: str
    make: Callable[[], dict[str, pd.DataFrame]]

    def write(self, folder: RunFolder, counted: str) -> int:
        """Make it and put it in place; gives the number of its rows of the table `counted`."""
        frames = self.make()
        for table in self.tables:
            folder.write_shard(table, self.name, frames[table])
        return len(frames[counted]) if counted in self.tables else 0


def make_shards(folder: RunFolder, shards: Sequence[Shard], workers: int) -> int:
    """Make what is missing; gives the rows made of the first table.

    Raises: RunError when a process failed; whatever a shard raises when there is one worker.
    """
    done = {table: set(folder.done_shards(table)) for shard in shards for table in shard.tables}
    missing = [s for s in shards if any(s.name not in done[table] for table in s.tables)]
    with tqdm(total=len(shards), initial=len(shards) - len(missing), unit="shard", desc=folder.manifest.study) as bar:
        if workers == 1 or len(missing) < 2:
            rows = 0
            for shard in missing:
                rows += shard.write(folder, shards[0].tables[0])
                bar.update()
            return rows
        return _by_processes(folder, missing, shards[0].tables[0], min(workers, len(missing)), bar)


def _by_processes(folder: RunFolder, shards: Sequence[Shard], counted: str, workers: int, bar: tqdm) -> int:
    if not hasattr(os, "fork"):
        raise RunError("expected a system that can fork for workers > 1; use workers: 1")
    queue, fill = os.pipe()
    news, tell = os.pipe()
    os.set_blocking(fill, False)
    os.write(fill, b"".join(n.to_bytes(_NUMBER, "big") for n in range(len(shards))))  # far below a pipe's 64 KB
    os.close(fill)
    parent, children = os.getpid(), []
    for _ in range(workers):
        pid = os.fork()
        if pid == 0:
            os.close(news)
            _work(folder, shards, counted, (queue, tell), parent)
        children.append(pid)
    os.close(tell)
    rows, problem = 0, ""
    try:
        with os.fdopen(news) as lines:  # ends when the last process has ended
            for line in lines:
                word, _, rest = line.rstrip("\n").partition(" ")
                if word == "made":
                    rows += int(rest)
                    bar.update()
                else:
                    problem = problem or rest
                    _drain(queue)
    except BaseException:
        _drain(queue)
        raise
    finally:
        os.close(queue)
        statuses = [os.waitpid(pid, 0)[1] for pid in children]
    if problem or any(statuses):
        raise RunError(problem or "a process that made shards was killed; start again to go on")
    return rows


def _drain(queue: int) -> None:
    """Take every number that is left, so that nobody begins another shard."""
    while os.read(queue, 4096):
        pass


def _work(folder: RunFolder, shards: Sequence[Shard], counted: str, pipes: tuple[int, int], parent: int) -> NoReturn:
    """The life of a forked process: shards until the queue is empty or the parent is gone."""
    (queue, tell), status = pipes, 1
    try:
        while os.getppid() == parent and (number := os.read(queue, _NUMBER)):
            rows = shards[int.from_bytes(number, "big")].write(folder, counted)
            os.write(tell, f"made {rows}\n".encode())
        status = 0
    except BaseException as error:  # noqa: BLE001 - told to the parent, which raises
        os.write(tell, f"failed {type(error).__name__}: {' '.join(str(error).split())[:2000]}\n".encode())
    finally:
        os._exit(status)
