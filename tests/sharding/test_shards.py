"""How a weight is sharded, with FSDP in this process alone; several ranks: test_sharded_runs.py."""

import copy

import pytest
import torch
from helpers import tiny_llama, tiny_qwen, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from apex_composer import Expander, find_sites
from apex_composer.sharding.ranks import ShardRanks
from apex_composer.sharding.sharded_executor import ShardedExecutor
from apex_composer.sharding.shards import find_shards


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    """torch.distributed with this process as its only rank."""
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("ranks") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def fsdp2(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: nn.Module) -> tuple[Expander, dict]:
    """A plain loop of two stages."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    expander = Expander(find_sites(model), threshold=0.25, kv_heads="expand")
    expander.attach(optimizer)
    with torch.no_grad(), expander.assessing():
        model(tokens(8))
    for step in range(6):
        if step % 3 == 0:
            expander.begin_stage()
        optimizer.zero_grad()
        with expander.assessing():
            loss = model(input_ids=tokens(4, seed=step), labels=tokens(4, seed=step)).loss
        loss.backward()
        optimizer.step()
    return expander, expander.relative_norms()


@pytest.mark.numeric
@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen])
def test_a_plain_loop_trains_the_same_with_fsdp2(build):
    """In float64: where a gradient is next to zero, rounding in float32 decides AdamW's step."""
    plain = build(dtype=torch.float64)
    sharded = fsdp2(copy.deepcopy(plain))
    expander, norms = train(sharded)
    assert [type(executor) for executor in expander.executors] == [ShardedExecutor]
    _, expected = train(plain)
    assert norms == pytest.approx(expected, rel=1e-7)
    for name, weight in plain.state_dict().items():
        found = sharded.state_dict()[name].full_tensor()
        torch.testing.assert_close(found, weight, rtol=0, atol=1e-9)


def test_plain_weights_keep_their_own_executors():
    expander, _ = train(tiny_llama())
    assert expander.executors == expander.operators
    for (shard,) in find_shards(expander.sites):
        assert shard.process_group is None and (shard.start, shard.stop) == (
            0,
            shard.parameter.numel(),
        )


def test_a_shard_is_a_view_of_weight_and_gradient():
    model = fsdp2(tiny_qwen())
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


def test_ranks_without_a_part_are_refused():
    """FSDP over a part of the ranks: the others would be left out of the sums."""
    with pytest.raises(ValueError, match=r"1 x 2 \(shards x replicas\) of 1 ranks"):
        ShardRanks(torch.distributed.group.WORLD, replicas=2)


def test_hidden_weights_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    model = tiny_llama()
    sites = find_sites(model)
    model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=False)
    with pytest.raises(ValueError, match="use_orig_params: got false.*set `use_orig_params: true`"):
        find_shards([type(sites[0])(**{**vars(sites[0]), "model": model})])


def test_kernels_for_sharded_weights_are_refused_before_anything_is_assessed():
    sites = find_sites(fsdp2(tiny_llama()))
    with pytest.raises(ValueError, match="got triton, but .*sharded weights.*Allowed here: auto"):
        Expander(sites, threshold=0.25, implementation="triton")
    Expander(sites, threshold=0.25, implementation="triton", expansion=False)
