"""A table outside the model: the same logits, rows read ahead, and the model as it was afterwards."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from engram_interp.memory.in_memory_rows import InMemoryRows
from engram_interp.memory.offload import offloaded


class SlowRows(InMemoryRows):
    """Rows that say who read them."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight)
        self.readers: list[str] = []

    def read(self, indices: np.ndarray) -> np.ndarray:
        self.readers.append(threading.current_thread().name)
        return super().read(indices)


@pytest.fixture
def batches(tiny_engram):
    return list(torch.randint(3, tiny_engram.vocab_size, (3, 2, 10), generator=torch.Generator().manual_seed(0)))


def readers_of(model):
    return {block: SlowRows(model.engram(block).table.weight.clone()) for block in model.engram_layers}


def test_logits_are_equal_and_the_tables_come_back(tiny_engram, batches):
    before = [tiny_engram.engram(block).table for block in tiny_engram.engram_layers]
    expected = tiny_engram(batches[0])
    with offloaded(tiny_engram, readers_of(tiny_engram)):
        assert torch.equal(tiny_engram(batches[0]), expected)
    assert [tiny_engram.engram(block).table for block in tiny_engram.engram_layers] == before
    with pytest.raises(KeyError, match="stop"), offloaded(tiny_engram, readers_of(tiny_engram)):
        raise KeyError("stop")
    assert [tiny_engram.engram(block).table for block in tiny_engram.engram_layers] == before
    assert torch.equal(tiny_engram(batches[0]), expected)


def test_rows_are_read_ahead_by_another_thread(tiny_engram, batches):
    readers = readers_of(tiny_engram)
    expected = [tiny_engram(tokens) for tokens in batches]
    with offloaded(tiny_engram, readers) as tables:
        tables.ahead(batches[0])
        for at, tokens in enumerate(batches):
            if at + 1 < len(batches):
                tables.ahead(batches[at + 1])
            assert torch.equal(tiny_engram(tokens), expected[at])
        assert {(t.hits, t.misses) for t in tables.tables.values()} == {(3, 0)}
    assert all(name.startswith("rows") for reader in readers.values() for name in reader.readers)


def test_a_wrong_guess_is_read_again(tiny_engram, batches):
    readers = readers_of(tiny_engram)
    expected = tiny_engram(batches[1])
    with offloaded(tiny_engram, readers) as tables:
        tables.ahead(batches[0])
        assert torch.equal(tiny_engram(batches[1]), expected)
        assert {(t.hits, t.misses) for t in tables.tables.values()} == {(0, 1)}


def test_other_tables_are_refused(tiny_engram):
    readers = readers_of(tiny_engram)
    first = tiny_engram.engram_layers[0]
    with pytest.raises(ValueError, match="expected a reader for each of the blocks"), offloaded(tiny_engram, {}):
        pass
    short = {**readers, first: InMemoryRows(torch.zeros(3, 2))}
    with pytest.raises(ValueError, match=rf"block {first}: expected a table of shape"), offloaded(tiny_engram, short):
        pass
