"""The plan of an exchange: what leaves one rank is what the other one expects."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_composer.exchange import Matrix, column_edges, plan_exchange


@given(
    columns=st.integers(1, 300),
    ranks=st.integers(1, 40),
    divisor=st.integers(1, 300),
)
def test_columns_are_cut_into_one_slice_per_rank(columns, ranks, divisor):
    grain = next(d for d in range(divisor, 0, -1) if columns % d == 0)
    edges = column_edges(columns, ranks, grain)
    assert len(edges) == ranks + 1 and edges[0] == 0 and edges[-1] == columns
    assert edges == sorted(edges)
    widths = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    if columns % ranks == 0:
        assert set(widths) == {columns // ranks}
    else:
        assert max(widths) <= columns / ranks * 1.125 + 1


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


@settings(max_examples=200, deadline=None)
@given(matrices())
def test_every_number_is_worked_on_once(case):
    found, ranks = case
    plans = [plan_exchange(found, rank, ranks) for rank in range(ranks)]
    assert len({plan.unit for plan in plans}) == 1
    for place, matrix in enumerate(found):
        free = matrix.shape[1 - matrix.axis]
        assert sum(plan.widths[place] for plan in plans) == free
    for name in ("P", "N"):
        for a, plan in enumerate(plans):
            route = plan.routes[name]
            for b, other in enumerate(plans):
                assert route.owners.sizes[b] == other.routes[name].workers.sizes[a]
            for side in (route.owners, route.workers):
                _check_side(side, plan.unit)
            _check_columns(found, plan, name, a)


def _check_side(side, unit: int) -> None:
    """No two entries share a place of the buffer, and what no entry has is padding."""
    blocks = side.blocks.positions.unsqueeze(1) * unit + torch.arange(unit)
    places = torch.cat([blocks.flatten(), side.singles.positions])
    assert len(places.unique()) == len(places)
    assert sum(side.sizes) - len(places) < unit * max(1, sum(size > 0 for size in side.sizes))


def _check_columns(found, plan, name: str, rank: int) -> None:
    """At axis 1 nothing travels but entries of rows that two ranks share."""
    lane = plan.routes[name].owners.singles
    for place, matrix in enumerate(found):
        if matrix.axis == 1:
            start, stop = matrix.intervals[rank]
            shared = (start % matrix.shape[1] > 0) + (stop % matrix.shape[1] > 0)
            assert lane.parts[place] <= shared * len(matrix.sets[name])
