"""Routes: what leaves one rank is what the other one expects."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_composer.sharding.routes import Matrix, lay_routes


@st.composite
def matrices(draw):
    """A few matrices cut anywhere or between rows, and the number of ranks."""
    ranks = draw(st.integers(1, 6))
    found = []
    for _ in range(draw(st.integers(1, 3))):
        rows, columns = draw(st.integers(2, 9)), draw(st.sampled_from([1, 2, 5, 8, 12]))
        axis = draw(st.sampled_from([0, 1])) if columns > 1 else 0
        size, grain = rows * columns, draw(st.sampled_from([1, columns]))
        inner = st.lists(st.integers(0, size // grain), min_size=ranks - 1, max_size=ranks - 1)
        edges = [0, *(grain * edge for edge in sorted(draw(inner))), size]
        intervals = tuple(
            (a, b) if a < b else (0, 0) for a, b in zip(edges, edges[1:], strict=False)
        )
        length = rows if axis == 0 else columns
        order = draw(st.permutations(range(length)))
        n = draw(st.integers(1, length // 2))
        sets = {"P": torch.tensor(sorted(order[:n])), "N": torch.tensor(sorted(order[n : 2 * n]))}
        found.append(Matrix((rows, columns), axis, intervals, sets))
    return found, ranks


@settings(max_examples=100)
@given(matrices())
def test_every_number_is_worked_on_once(case):
    found, ranks = case
    by_rank = [lay_routes(found, rank, ranks) for rank in range(ranks)]
    (block,) = {routes.block for routes in by_rank}
    for place, matrix in enumerate(found):
        free = matrix.shape[1 - matrix.axis]
        assert sum(routes.widths[place] for routes in by_rank) == free
    for name in ("P", "N"):
        for a, routes in enumerate(by_rank):
            route = routes.of[name]
            for b, other in enumerate(by_rank):
                assert route.owners.sizes[b] == other.of[name].workers.sizes[a]
            for side in (route.owners, route.workers):
                _check_side(side, block)
            _check_columns(found, route, a)


def _check_side(side, block: int) -> None:
    """No two entries share a place of the buffer, and what no entry has is padding."""
    blocks = side.blocks.positions.unsqueeze(1) * block + torch.arange(block)
    places = torch.cat([blocks.flatten(), side.singles.positions])
    assert len(places.unique()) == len(places)
    assert sum(side.sizes) - len(places) < block * max(1, sum(size > 0 for size in side.sizes))


def _check_columns(found, route, rank: int) -> None:
    """At axis 1 nothing travels but entries of rows that two ranks share."""
    lane = route.owners.singles
    for place, matrix in enumerate(found):
        if matrix.axis == 1:
            start, stop = matrix.intervals[rank]
            shared = (start % matrix.shape[1] > 0) + (stop % matrix.shape[1] > 0)
            assert lane.parts[place] <= shared * len(matrix.sets["P"])


def flattened_layer(hidden, channels, heads, kv_heads, ranks):
    """One layer's weights as FSDP1 cuts them: one flat vector, in equal parts."""
    rows, kv_rows = hidden // heads * heads, hidden // heads * kv_heads
    shapes = [(rows, hidden), (kv_rows, hidden), (kv_rows, hidden), (hidden, rows)]
    shapes += [(channels, hidden), (channels, hidden), (hidden, channels)]
    axes, sizes = (0, 0, 0, 1, 0, 0, 1), [a * b for a, b in shapes]
    part, begin, found = -(-(sum(sizes) + 2 * hidden) // ranks), 0, []
    for shape, axis, size in zip(shapes, axes, sizes, strict=True):
        edges = [min(max(rank * part - begin, 0), size) for rank in range(ranks + 1)]
        intervals = tuple((a, b) if a < b else (0, 0) for a, b in pairwise(edges))
        selected = shape[axis] // 8
        order = torch.randperm(shape[axis])
        sets = {"P": order[:selected].sort().values, "N": order[-selected:].sort().values}
        found.append(Matrix(shape, axis, intervals, sets))
        begin += size
    return found


def index_bytes(routes) -> int:
    lanes = [
        lane
        for route in routes.of.values()
        for side in (route.owners, route.workers)
        for lane in (side.blocks, side.singles)
    ]
    return sum(t.nbytes for lane in lanes for t in (lane.positions, *lane.local))


@pytest.mark.parametrize(
    ("layers", "sizes", "ranks"),
    [(22, (2048, 5632, 32, 4), 6), (32, (4096, 11008, 32, 32), 7)],
    ids=["TinyLLaMA on 6", "Llama-2-7B on 7"],
)
def test_the_index_stays_small_where_ranks_do_not_divide_the_sizes(layers, sizes, ranks):
    """With one number for every entry that travels it was 0.8 and 5 GB a rank."""
    found = flattened_layer(*sizes, ranks)
    for rank in range(ranks):
        assert layers * index_bytes(lay_routes(found, rank, ranks)) < 10e6
