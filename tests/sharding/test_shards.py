"""How a weight is sharded, with FSDP in this process; several ranks: test_sharded_loops.py."""

import pytest
import torch
from helpers import tiny_llama, tiny_qwen, tokens
from sharded_loop import fsdp2
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from apex_composer import find_sites
from apex_composer.sharding.shards import find_shards

pytestmark = pytest.mark.usefixtures("one_rank")


def test_a_plain_weight_is_held_whole():
    for (shard,) in find_shards(find_sites(tiny_llama())):
        assert shard.process_group is None
        assert (shard.start, shard.stop) == (0, shard.parameter.numel())


def test_a_shard_is_a_view_of_weight_and_gradient():
    model = fsdp2(tiny_qwen(), init_device_mesh("cpu", (1,)))
    sites = find_sites(model)
    pairs = find_shards(sites)
    (queries, bias), output = pairs[0], pairs[3]
    assert queries.shape == (32, 32) and bias.shape == (32, 1) and len(output) == 1
    assert queries.gradient() is None
    model(input_ids=tokens(2), labels=tokens(2)).loss.backward()
    find_shards(sites)
    for shard in (queries, bias):
        shard.values().fill_(3)
        shard.gradient().fill_(5)
        assert shard.parameter.full_tensor().eq(3).all()
        assert shard.parameter.grad.full_tensor().eq(5).all()


def test_gathered_weights_are_resharded_first():
    """After a forward pass without gradients the root's weights are still whole."""
    model = fully_shard(tiny_llama(), mesh=init_device_mesh("cpu", (1,)))
    sites = find_sites(model)
    with torch.no_grad():
        before = model(tokens(2)).logits
        find_shards(sites)[0][0].values().mul_(2)
        assert not torch.equal(model(tokens(2)).logits, before)


def test_gradients_in_lower_precision_are_refused():
    model = tiny_llama()
    shard = find_shards(find_sites(model))[0][0]
    shard.parameter.grad = torch.zeros_like(shard.parameter)
    object.__setattr__(shard, "parameter", _Weight(shard.parameter))
    with pytest.raises(ValueError, match="gradients in torch.bfloat16.*keep_low_precision_grads"):
        shard.gradient()


class _Weight:
    """A float32 weight with a bfloat16 gradient, which torch itself does not allow to build."""

    def __init__(self, parameter):
        self.dtype, self.grad = parameter.dtype, parameter.grad.bfloat16()


def test_a_part_of_a_weight_without_its_fsdp_module_is_refused():
    site = find_sites(tiny_llama())[0]
    site.module.weight = nn.Parameter(site.weight.detach().flatten()[:100])
    with pytest.raises(ValueError, match=r"q_proj.weight has the shape \(100,\).*outermost"):
        find_shards([site])


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()])
def test_tensor_parallelism_is_refused(placement):
    site = find_sites(tiny_llama())[0]
    mesh = init_device_mesh("cpu", (1,))
    whole = site.weight.detach()
    site.module.weight = nn.Parameter(distribute_tensor(whole, mesh, [placement]))
    with pytest.raises(ValueError, match="tensor parallelism.*Remove `tp_config`"):
        find_shards([site])


def test_hidden_weights_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    model = tiny_llama()
    sites = find_sites(model)
    model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=False)
    with pytest.raises(ValueError, match="use_orig_params: got false.*set `use_orig_params: true`"):
        find_shards([type(sites[0])(**{**vars(sites[0]), "model": model})])
