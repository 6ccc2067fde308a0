"""The ranks that share weights; what several of them exchange: test_sharded_loops.py."""

import pytest
import torch

from apex_composer.sharding import ranks
from apex_composer.sharding.ranks import ShardRanks

pytestmark = pytest.mark.usefixtures("one_rank")


def test_ranks_without_a_part_are_refused():
    """FSDP over a part of the ranks: the others would be left out of the sums."""
    with pytest.raises(ValueError, match=r"1 x 2 \(shards x replicas\) of 1 ranks"):
        ShardRanks(torch.distributed.group.WORLD, replicas=2)


def test_a_sum_over_replicas_counts_every_share_once(monkeypatch):
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    both = ShardRanks(torch.distributed.group.WORLD, replicas=2)
    assert both.sum(torch.tensor([2.0, 4.0])).tolist() == [1.0, 2.0]
