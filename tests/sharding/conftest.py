"""FSDP in this process alone; several ranks: test_sharded_loops.py."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """torch.distributed with this process as its only rank."""
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("ranks") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
