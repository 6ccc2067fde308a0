"""Which executors act, with FSDP2 in this process alone; several ranks: test_sharded_loops.py."""

import pytest
import torch
from helpers import tiny_llama, tiny_qwen
from sharded_loop import fsdp2, train_loop
from torch.distributed.device_mesh import init_device_mesh

from apex_composer import Expander, find_sites

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.numeric
@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen])
def test_sharded_weights_train_as_whole_ones_do_by_an_executor_of_their_own(build):
    whole = train_loop(build(dtype=torch.float64))
    sharded = train_loop(build(dtype=torch.float64), init_device_mesh("cpu", (1,)))
    assert set(whole["executors"]) == {"ExpansionOperator"}
    assert sharded["executors"] == ["ShardedExecutor"]
    assert sharded["norms"] == pytest.approx(whole["norms"], rel=1e-7)
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(sharded["weights"][name], weight, rtol=0, atol=1e-9)


def test_kernels_for_sharded_weights_are_refused_before_anything_is_assessed():
    sites = find_sites(fsdp2(tiny_llama(), init_device_mesh("cpu", (1,))))
    with pytest.raises(ValueError, match="got triton, but .*sharded weights.*Allowed here: auto"):
        Expander(sites, threshold=0.25, implementation="triton")
    Expander(sites, threshold=0.25, implementation="triton", expansion=False)
