"""Slices of columns are fair, and a row survives being cut into blocks."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from apex_composer.sharding.column_slices import column_edges, filled_slices, packing


@given(columns=st.integers(1, 300), ranks=st.integers(1, 40))
def test_columns_are_cut_into_one_slice_per_rank(columns, ranks):
    edges = column_edges(columns, ranks)
    assert len(edges) == ranks + 1 and edges[0] == 0 and edges[-1] == columns
    assert edges == sorted(edges)
    widths = [b - a for a, b in pairwise(edges)]
    if columns % ranks == 0:
        assert set(widths) == {columns // ranks}
    else:
        assert max(widths) <= columns / ranks * 1.125 + 1


@given(columns=st.integers(1, 300), ranks=st.integers(1, 40), longer=st.integers(0, 3))
def test_a_row_becomes_blocks_and_a_row_again(columns, ranks, longer):
    edges, row = column_edges(columns, ranks), torch.arange(columns)
    unit = max(b - a for a, b in pairwise(edges)) + longer
    maps = packing(edges, unit)
    if maps is None:
        assert len(filled_slices(edges)) * unit == columns
        return
    blocks = row[maps[0]].view(-1, unit)
    for block, i in zip(blocks, filled_slices(edges), strict=True):
        assert torch.equal(block[: edges[i + 1] - edges[i]], row[edges[i] : edges[i + 1]])
    assert torch.equal(blocks.flatten()[maps[1]], row)
