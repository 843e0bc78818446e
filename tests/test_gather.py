"""Are the rows that the fast gather reads those of the table, bit for bit?"""

from __future__ import annotations

import pytest
import torch

from engram_interp.memory.table import MultiHeadTable, gather_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("width", [1, 8, 33, 80])
def test_rows_are_those_of_the_table(dtype, width):
    generator = torch.Generator().manual_seed(width)
    table = torch.randn(301, width, generator=generator).to(dtype)
    for shape in ((3, 70, 16), (1, 1, 1), (0, 4, 2)):
        rows = torch.randint(0, 301, shape, generator=generator)
        found = gather_rows(table, rows)
        assert found.equal(torch.nn.functional.embedding(rows, table))
        assert found.data_ptr() % 64 == 0
        again = gather_rows(table, rows.flip(0), found)
        assert again.equal(torch.nn.functional.embedding(rows.flip(0), table))
        assert again.data_ptr() == found.data_ptr()
    assert gather_rows(table[::2], rows.clamp_max(150)).equal(table[::2][rows.clamp_max(150)])


def test_memory_is_used_again_only_when_nobody_sees_it():
    table = torch.arange(12.0).view(3, 4)
    rows, others = torch.zeros(50, dtype=torch.int64), torch.full((50,), 2)
    seen = gather_rows(table, rows)[7:9].numpy()  # the tensor is gone, its memory is not
    held = gather_rows(table, others)
    assert (seen == table[0].numpy()).all()
    place = held.data_ptr()
    del held
    assert gather_rows(table, rows[:40]).data_ptr() == place
    assert gather_rows(table, rows[:2]).data_ptr() != place  # would keep far more than it needs
    kept = [gather_rows(table, rows if i % 2 else others) for i in range(6)]
    assert len({x.data_ptr() for x in kept}) == 6
    assert all(x.equal(table[0 if i % 2 else 2].expand(50, 4)) for i, x in enumerate(kept))


@pytest.mark.parametrize("width", [8, 80])
@pytest.mark.parametrize("row", [-1, 301])
def test_a_row_that_is_not_there_is_refused(width, row):
    rows = torch.tensor([[[0, 300, row]]])
    with pytest.raises(IndexError):
        gather_rows(torch.zeros(301, width), rows)


def test_training_reads_with_a_gradient():
    table = MultiHeadTable(20, 4)
    torch.nn.init.normal_(table.weight, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([[[3, 5], [3, 0]]])
    trained = table(rows)
    trained.sum().backward()
    assert table.weight.grad.sum(1).nonzero().flatten().tolist() == [0, 3, 5]
    with torch.no_grad():
        assert table(rows).equal(trained)
    assert not table(rows).is_inference() and table.requires_grad_(False)(rows).equal(trained)
