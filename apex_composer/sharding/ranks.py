"""The ranks that share the weights, and all that they say to each other in a step."""

from typing import Any

import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from apex_composer.distributed import world_size


class ShardRanks:
    """The ranks that hold one copy of the sharded weights between them.

    Args:
        process_group: these ranks.
        replicas: how often the weights are held so, default once (more: HSDP).

    Raises:
        ValueError: if there are ranks that hold no part of the weights.
    """

    def __init__(self, process_group: ProcessGroup, replicas: int = 1):
        self._process_group, self._replicas = process_group, replicas
        self.rank, self.size = process_group.rank(), process_group.size()
        if self.size * replicas != world_size():
            raise ValueError(
                f"the weights are sharded over {self.size} x {replicas} (shards x replicas) of "
                f"{world_size()} ranks, allowed: all ranks. Shard over all of them, or replicate "
                "the shards over the others (HSDP)"
            )

    def gather(self, own: Any) -> list[Any]:
        """Plain data of every rank, in rank order; waits for them."""
        everyone: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(everyone, own, group=self._process_group)
        return everyone

    def exchange(self, chunks: Tensor, sizes: list[int], expected: list[int]) -> Tensor:
        """Send every rank its chunk and receive theirs.

        Args:
            chunks: [sum of sizes], the chunk for rank 0 first.
            sizes: numbers in each chunk.
            expected: numbers that each rank sends here.

        Returns:
            [sum of expected], the chunk of rank 0 first.
        """
        received = chunks.new_empty(sum(expected))
        torch.distributed.all_to_all_single(
            received, chunks, expected, sizes, group=self._process_group
        )
        return received

    def sum(self, tensor: Tensor) -> Tensor:
        """Add the ranks' shares up, in place: the same bits on all ranks, of all replicas.

        The sum goes over all ranks, not over each replica's by themselves: then even replicas whose
        networks add in another order cannot drift apart.
        """
        torch.distributed.all_reduce(tensor)
        return tensor.div_(self._replicas) if self._replicas > 1 else tensor
