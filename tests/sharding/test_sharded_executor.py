"""Operators of sharded weights on simulated ranks against whole weights, in float64."""

import copy

import pytest
import torch
from helpers import linear_site
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_ranks import cut, random_operator, run_ranks, simulate, whole, with_gradients

from apex_composer.sharding.sharded_executor import ShardedExecutor

EXACT = {"rtol": 1e-11, "atol": 1e-11}


def compare(operators, results, *, gradients: bool) -> None:
    for i, operator in enumerate(operators):
        for place, parameter in enumerate(operator.site.parameters()):
            shards = [result["shards"][i][place] for result in results]
            torch.testing.assert_close(whole(shards), parameter.detach().flatten(), **EXACT)
            if gradients:
                found = whole(shards, gradient=True)
                torch.testing.assert_close(found, parameter.grad.flatten(), **EXACT)
        for side, factor in enumerate(operator.factors):
            own = [result["operators"][i].factors[side].grad for result in results]
            if gradients:
                torch.testing.assert_close(own[0], factor.grad, **EXACT)
                assert all(torch.equal(own[0], other) for other in own)


@st.composite
def sharded_sites(draw):
    """Some sites of all kinds, the number of ranks, and where each parameter is cut."""
    ranks = draw(st.integers(1, 5))
    operators, edges = [], []
    for i in range(draw(st.integers(1, 4))):
        axis = draw(st.sampled_from([0, 1]))
        unit_size, bias = draw(st.sampled_from([1, 2])), draw(st.booleans())
        transposed = draw(st.booleans())
        offset = draw(st.integers(0, 3))
        k = draw(st.sampled_from([1, 2, 3, 4]))
        units = draw(st.integers(2 * k, 2 * k + 3))
        chosen = draw(st.permutations(range(units)))
        length, other = units * unit_size + offset, draw(st.sampled_from([1, 3, 6, 8]))
        rows, columns = (length, other) if axis == 0 else (other, length)
        site = linear_site(
            rows,
            columns,
            axis=axis,
            unit_size=unit_size,
            offset=offset,
            bias=bias,
            transposed=transposed,
            name=f"{i}",
        )
        advantageous, disadvantageous = sorted(chosen[:k]), sorted(chosen[k : 2 * k])
        operators.append(random_operator(site, advantageous, disadvantageous))
        edges.append([draw(cuts(p.numel(), p.shape, ranks)) for p in site.parameters()])
    return with_gradients(operators), edges, ranks


@st.composite
def cuts(draw, size: int, shape, ranks: int) -> list[int]:
    """`ranks + 1` ascending positions: anywhere (FSDP1) or between rows (FSDP2)."""
    grain = draw(st.sampled_from([1, size // shape[0]]))
    inner = st.lists(st.integers(0, size // grain), min_size=ranks - 1, max_size=ranks - 1)
    return [0, *(grain * edge for edge in sorted(draw(inner))), size]


@settings(max_examples=100)
@given(sharded_sites())
def test_any_cut_computes_what_whole_weights_do(case):
    operators, edges, ranks = case

    def a_step(executor):
        executor.fold()
        executor.map_gradient()
        executor.unfold()
        executor.fold()
        return executor.relative_norms()

    results = simulate(operators, edges, ranks, a_step)
    for operator in operators:
        operator.fold()
        operator.map_gradient()
        operator.unfold()
        operator.fold()
    compare(operators, results, gradients=True)
    for operator in operators:
        expected = pytest.approx(float(operator.relative_norm()), rel=1e-9)
        for result in results:
            assert result["returned"][operator.site.name] == expected
    for result in results:
        # fold 2, map 2 and 1 sum, unfold none, fold 2, and the norms' sum
        calls = ["exchange"] * 2 + ["exchange", "sum", "exchange"] + ["exchange"] * 2 + ["sum"]
        assert [name for name, _ in result["ranks"].calls] == calls


def a_case(ranks: int = 3):
    """Rows with a bias, and columns, cut in the middle of rows."""
    torch.manual_seed(0)
    rows = linear_site(9, 7, bias=True, name="rows")
    columns = linear_site(7, 9, axis=1, name="columns")
    operators = with_gradients(random_operator(s, [1, 4], [0, 3]) for s in (rows, columns))
    edges = [[[0, 25, 40, 63], [0, 4, 4, 9]], [[0, 10, 31, 63]]]
    return operators, edges, ranks


def test_a_resumed_executor_subtracts_the_same_bits():
    """It has not folded: what the fold before added is computed from W[P], L and R."""

    def steps(executor):
        executor.fold()
        folded = [values.clone() for values in executor._values()]
        executor.unfold()
        uninterrupted = [values.clone() for values in executor._values()]
        for values, saved in zip(executor._values(), folded, strict=True):
            values.copy_(saved)
        shards = [
            [job.shard for job in executor._jobs if job.operator is operator]
            for operator in executor.operators
        ]
        resumed = ShardedExecutor(executor.operators, shards, executor._ranks)
        resumed.unfold()
        return all(map(torch.equal, resumed._values(), uninterrupted))

    assert all(result["returned"] for result in simulate(*a_case(), steps))


def test_restoring_needs_no_other_rank():
    """And what is restored is subtracted by the next unfold, although W[P] has changed."""

    def steps(executor):
        executor.fold()
        executor.unfold()
        for shard in executor._values():
            shard.mul_(1.5)  # the failed optimizer step
        base = [shard.clone() for shard in executor._values()]
        calls = len(executor._ranks.calls)
        executor.restore()
        assert executor.folded and len(executor._ranks.calls) == calls
        executor.unfold()
        assert len(executor._ranks.calls) == calls
        for shard, expected in zip(executor._values(), base, strict=True):
            torch.testing.assert_close(shard, expected, **EXACT)
        executor.map_gradient()  # W[P] is gathered anew

    simulate(*a_case(), steps)


def test_missing_gradients_count_as_zero():
    operators, edges, ranks = a_case()
    rows = operators[0].site
    rows.module.bias.grad = None  # frozen
    operators[1].site.weight.grad = None  # not reached by the loss

    def steps(executor):
        executor.fold()
        executor.map_gradient()

    results = simulate(operators, edges, ranks, steps)
    for operator in operators:
        operator.fold()
        operator.map_gradient()
    for result in results:
        first, second = result["operators"]
        for own, factor in zip(first.factors, operators[0].factors, strict=True):
            torch.testing.assert_close(own.grad, factor.grad, **EXACT)
        assert all(factor.grad.count_nonzero() == 0 for factor in second.factors)
        assert result["shards"][0][1].parameter.grad is None
        assert result["shards"][1][0].parameter.grad is None


def test_parts_of_one_fused_weight():
    """Queries, keys and values in one parameter: three operators add to the same shard."""
    whole_site = linear_site(12, 5, bias=True, name="fused")
    sites = [
        type(whole_site)(f"fused[{i}]", whole_site.module, 0, whole_site.group, offset=4 * i)
        for i in range(3)
    ]
    operators = with_gradients(random_operator(site, [1], [3]) for site in sites)
    edges = [[0, 17, 17, 60], [0, 5, 8, 12]]
    parameters = whole_site.parameters()

    def one_rank(ranks):
        shards = [cut(p, own, ranks.rank) for p, own in zip(parameters, edges, strict=True)]
        own = [copy.deepcopy(operator) for operator in operators]
        executor = ShardedExecutor(own, [shards] * 3, ranks)
        executor.fold()
        executor.map_gradient()
        return shards

    parts = run_ranks(3, one_rank)
    for operator in operators:
        operator.fold()
    for operator in operators:
        operator.map_gradient()
    for place, parameter in enumerate(parameters):
        shards = [own[place] for own in parts]
        torch.testing.assert_close(whole(shards), parameter.detach().flatten(), **EXACT)
        found = whole(shards, gradient=True)
        torch.testing.assert_close(found, parameter.grad.flatten(), **EXACT)
