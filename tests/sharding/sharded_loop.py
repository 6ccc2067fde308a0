"""A training loop without a trainer, on one process or with FSDP.

Usage: sharded_loop.py OUT RANKS MODE [MODE ...]: trains with every mode, fsdp1 or fsdp2, on as many
processes with gloo, one after the other; OUT gets <mode>-rank<rank>.pt of each.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from counted_collectives import Counter
from forks import fork_ranks
from helpers import tiny_llama, tokens
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from apex_composer import Expander, find_sites
from apex_composer.sharding.shards import find_shards
from apex_composer.trainable.frozen import freeze_untrained

# Sizes that no number of ranks divides: shards are cut in the middle of rows, some are empty.
ODD = {"hidden": 18, "channels": 27, "heads": 6, "kv_heads": 2, "head_dim": 4}
BATCH_SIZE = 8
SHARDED = ("ShardedExecutor",)
COUNTER = Counter()
# Of which only some rows are trained.
ROWS = {
    "selected": {"trainable": "selected"},
    "half": {"trainable": "half", "trainable_share": 0.9},
}


def fsdp1(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The model with every layer's weights in shards, and all others in those of the root."""
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({type(model.model.layers[0])}),
        device_id=torch.device("cpu"),
        device_mesh=mesh,
        use_orig_params=True,
    )


def fsdp2(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """As `fsdp1`; in place."""
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh)
    return model


def ddp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The model with gradients that are averaged over the ranks."""
    return nn.parallel.DistributedDataParallel(model)


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights, gathered."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: tensor.clone() for name, tensor in weights.items()}


def own_shards(expander: Expander) -> list[list]:
    """Every weight's name and the interval of it that this rank holds, with what is in it."""
    found = find_shards(expander.sites)
    return [[s.name, s.start, s.stop, s.values().clone()] for (s, *_) in found]


def train_loop(model: nn.Module, mesh: DeviceMesh | None = None, shard=fsdp2, **settings) -> dict:
    """Two stages of three steps; every rank takes its part of each batch.

    Args:
        model: trained in place, in float64: where a gradient is next to zero, rounding in float32
            decides AdamW's step.
        mesh: (replicas, shards) or (shards,), or None for one process.
        shard: fsdp1, fsdp2 or ddp.
        settings: more of the Expander's.
    """
    share = slice(None)
    if mesh is not None:
        if shard is ddp:
            names = ("trainable", "trainable_share")
            own = {name: settings[name] for name in names if name in settings}
            freeze_untrained(find_sites(model), threshold=0.25, kv_heads="expand", **own)
        model = shard(model, mesh)
        rank, ranks = torch.distributed.get_rank(), mesh.size()
        share = slice(BATCH_SIZE * rank // ranks, BATCH_SIZE * (rank + 1) // ranks)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    settings = {"threshold": 0.25, "kv_heads": "expand", "operator_lr_scale": 3.0, **settings}
    expander = Expander(find_sites(model), **settings)
    expander.attach(optimizer)
    with torch.no_grad(), expander.assessing():
        model(tokens(BATCH_SIZE)[share])
    for step in range(6):
        if step % 3 == 0:
            expander.begin_stage()
        optimizer.zero_grad()
        ids = tokens(BATCH_SIZE, seed=step)[share]
        with expander.assessing():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if expander.training is not None:
            expander.training.clip_grad_norm(0.05)
        COUNTER.calls.clear()
        with COUNTER.counting():
            optimizer.step()
    return {
        "weights": whole_weights(model),
        "shards": own_shards(expander),
        "calls": list(COUNTER.calls),
        "factors": expander.state_dict()["factors"],
        "rows": expander.state_dict().get("rows"),
        "norms": expander.relative_norms(),
        "executors": [type(executor).__name__ for executor in expander.executors],
    }


def check_shards(ranks: list[dict], whole: dict[str, torch.Tensor]) -> int:
    """The intervals tile every weight, and hold what is there; how many begin inside a row.

    Args:
        ranks: with `shards` as `own_shards` tells them.
        whole: all weights, by the names that the sites have.
    """
    inside = 0
    for places in zip(*(own["shards"] for own in ranks), strict=True):
        matrix = whole[places[0][0]]
        weight = matrix.flatten()
        held = [(start, stop) for _, start, stop, _ in places if stop > start]
        assert [start for start, _ in held[1:]] == [stop for _, stop in held[:-1]]
        assert held[0][0] == 0 and held[-1][1] == len(weight)
        for _, start, stop, values in places:
            assert torch.equal(values, weight[start:stop])
            inside += start % matrix.shape[1] > 0
    return inside


def check_loops(ranks: list[dict], expected: dict, executors: Sequence[str] = SHARDED) -> None:
    """Every rank has trained what one process has, and all of them the same bits."""
    for own in ranks:
        assert own["executors"] == [*executors]
        torch.testing.assert_close(own["norms"], expected["norms"], rtol=1e-9, atol=0)
        torch.testing.assert_close(own["weights"], expected["weights"], rtol=0, atol=1e-10)
        for name, weight in ranks[0]["weights"].items():
            assert torch.equal(own["weights"][name], weight)
        for name, pair in ranks[0]["factors"].items():
            assert all(map(torch.equal, own["factors"][name], pair))
        torch.testing.assert_close(own["rows"], expected["rows"], rtol=0, atol=1e-10)


def one_rank(out: Path, modes: list[str]) -> None:
    torch.distributed.init_process_group("gloo")
    COUNTER.install()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for mode in modes:
        model = tiny_llama(**ODD, dtype=torch.float64)
        way, _, rows = mode.partition(" ")
        shard = {"fsdp1": fsdp1, "fsdp2": fsdp2, "ddp": ddp}[way]
        end = train_loop(model, mesh, shard, **ROWS.get(rows, {}))
        torch.save(end, out / f"{mode}-rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(any(fork_ranks(int(sys.argv[2]), one_rank, Path(sys.argv[1]), sys.argv[3:])))
