"""Ranks as threads of one process: what `ShardRanks` does, and what it costs."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Board:
    """What the ranks of one simulation tell each other."""

    def __init__(self, size: int):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.slots: list[Any] = [None] * size
        self.exchanges: list[Any] = []

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
        self.calls: list[str] = []
        self.sent: list[int] = []  # numbers that left this rank, by exchange

    def gather(self, own: Any) -> list[Any]:
        return self._board.share(self.rank, own)

    def exchange(self, chunks: Tensor, sizes: list[int], expected: list[int]) -> Tensor:
        assert len(chunks) == sum(sizes)
        everyone = self._board.share(self.rank, chunks.split(sizes))
        received = [everyone[peer][self.rank] for peer in range(self.size)]
        assert [len(chunk) for chunk in received] == expected
        self.calls.append("exchange")
        self.sent.append(sum(sizes) - sizes[self.rank])
        return torch.cat(received)

    def sum(self, tensor: Tensor) -> Tensor:
        self.calls.append("sum")
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
