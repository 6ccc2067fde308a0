"""Ranks as threads of one process: what `ShardRanks` does and costs, and operators on them."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from helpers import selection
from torch import Tensor, nn

from apex_composer.operators.operator import ExpansionOperator
from apex_composer.ops.monarch import MonarchFactors
from apex_composer.sharding.sharded_executor import ShardedExecutor
from apex_composer.sharding.shards import Shard


class Board:
    """What the ranks of one simulation tell each other."""

    def __init__(self, size: int):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.slots: list[Any] = [None] * size

    def share(self, rank: int, own: Any) -> list[Any]:
        """Everyone's value, in rank order."""
        self.slots[rank] = own
        self.barrier.wait()
        everyone = list(self.slots)
        self.barrier.wait()
        return everyone


class SimulatedRanks:
    """The interface of ShardRanks, with sizes of chunks checked from both ends."""

    def __init__(self, rank: int, board: Board):
        self.rank, self.size, self._board = rank, board.size, board
        # Name, and the numbers that left this rank in an exchange or are in a sum's buffer.
        self.calls: list[tuple[str, int]] = []

    def gather(self, own: Any) -> list[Any]:
        return self._board.share(self.rank, own)

    def exchange(self, chunks: Tensor, sizes: list[int], expected: list[int]) -> Tensor:
        assert len(chunks) == sum(sizes)
        everyone = self._board.share(self.rank, chunks.split(sizes))
        received = [everyone[peer][self.rank] for peer in range(self.size)]
        assert [len(chunk) for chunk in received] == expected
        self.calls.append(("exchange", sum(sizes) - sizes[self.rank]))
        return torch.cat(received)

    def sum(self, tensor: Tensor) -> Tensor:
        self.calls.append(("sum", tensor.numel()))
        total = torch.stack(self._board.share(self.rank, tensor.clone())).sum(0)
        return tensor.copy_(total)


def run_ranks(size: int, function: Callable[[SimulatedRanks], Any]) -> list[Any]:
    """Run a function on every rank at once; returns what each returned, or raises its error."""
    board, results, errors = Board(size), [None] * size, []

    def target(rank: int) -> None:
        try:
            results[rank] = function(SimulatedRanks(rank, board))
        except BaseException as error:
            errors.append(error)
            board.barrier.abort()

    threads = [threading.Thread(target=target, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert not errors
    return results


def random_operator(site, advantageous, disadvantageous) -> ExpansionOperator:
    """Random factors, not yet folded in; P and N in units of the site."""
    n = len(advantageous) * site.group.unit_size
    p = max(d for d in range(1, n + 1) if n % d == 0 and d * d <= n)
    dtype = site.weight.dtype
    factors = MonarchFactors(
        torch.randn(n // p, p, p, dtype=dtype), torch.randn(p, n // p, n // p, dtype=dtype)
    )
    return ExpansionOperator(site, selection(advantageous, disadvantageous), factors)


def with_gradients(operators) -> list[ExpansionOperator]:
    operators = list(operators)
    for operator in operators:
        for parameter in operator.site.parameters():
            parameter.grad = torch.randn_like(parameter)
    return operators


def cut(parameter: nn.Parameter, edges: list[int], rank: int, name="w") -> Shard:
    """What a rank holds of a parameter: a copy, with a copy of its gradient."""
    start, stop = edges[rank], edges[rank + 1]
    if start == stop:
        start = stop = 0  # as FSDP1 tells it
    own = nn.Parameter(parameter.detach().flatten()[start:stop].clone())
    if parameter.grad is not None and start < stop:
        own.grad = parameter.grad.flatten()[start:stop].clone()
    rows, columns = (*parameter.shape, 1)[:2]
    return Shard(name, own, (rows, columns), start, stop, process_group=object())


def whole(shards: list[Shard], gradient: bool = False) -> torch.Tensor:
    """The ranks' parts put together, flat."""
    parts = [s.parameter.grad if gradient else s.parameter.detach() for s in shards]
    return torch.cat([p for p in parts if p is not None])


def simulate(operators, edges, ranks: int, steps) -> list[dict]:
    """Every rank's shards, operators, calls and what `steps(executor)` returned.

    Args:
        operators: with whole weights.
        edges: by operator and parameter, where it is cut, see `cut`.
        ranks: how many.
        steps: of a ShardedExecutor, done on every rank.
    """

    def one_rank(own_ranks):
        own = [copy.deepcopy(operator) for operator in operators]
        shards = [
            [
                cut(parameter, edges[i][place], own_ranks.rank)
                for place, parameter in enumerate(operator.site.parameters())
            ]
            for i, operator in enumerate(operators)
        ]
        executor = ShardedExecutor(own, shards, own_ranks)
        returned = steps(executor)
        return {"shards": shards, "operators": own, "returned": returned, "ranks": own_ranks}

    return run_ranks(ranks, one_rank)
