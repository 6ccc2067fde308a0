"""A training loop without a trainer, on one process or with FSDP2 (Composer has no HSDP for it)."""

import torch
from helpers import tokens
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from apex_composer import Expander, find_sites

# Sizes that no number of ranks divides: shards are cut in the middle of rows, some are empty.
ODD = {"hidden": 22, "channels": 27, "heads": 4, "kv_heads": 2, "head_dim": 6}
BATCH_SIZE = 8


def fsdp2(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The model with every layer's weights in shards, and all others in those of the root."""
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh)
    return model


def train_loop(model: nn.Module, mesh: DeviceMesh | None = None) -> dict:
    """Two stages of three steps; every rank takes its part of each batch.

    Args:
        model: trained in place, in float64: where a gradient is next to zero, rounding in float32
            decides AdamW's step.
        mesh: (replicas, shards) or (shards,), or None for one process.
    """
    share = slice(None)
    if mesh is not None:
        fsdp2(model, mesh)
        rank, ranks = torch.distributed.get_rank(), mesh.size()
        share = slice(BATCH_SIZE * rank // ranks, BATCH_SIZE * (rank + 1) // ranks)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    expander = Expander(find_sites(model), threshold=0.25, kv_heads="expand", operator_lr_scale=3.0)
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
        optimizer.step()
    whole = {n: t if mesh is None else t.full_tensor() for n, t in model.state_dict().items()}
    return {
        "weights": {name: tensor.detach().clone() for name, tensor in whole.items()},
        "factors": expander.state_dict()["factors"],
        "norms": expander.relative_norms(),
        "executors": [type(executor).__name__ for executor in expander.executors],
    }
