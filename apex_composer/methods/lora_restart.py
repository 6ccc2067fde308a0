"""peft's LoRA in a model: merged into the weights that it changes, and begun anew."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from apex_composer.assessment.selection import seeded_generator
from apex_composer.extras import needing
from apex_composer.model.sites import clean_name
from apex_composer.ops.full_precision import bmm

if TYPE_CHECKING:
    from peft.tuners.lora import Linear, LoraLayer

_EXACT = (torch.float32, torch.float64)


def adapters(model: nn.Module) -> Iterator[tuple[str, "Linear", str]]:
    """Each linear layer of a model that has an adapter: its name, itself, the adapter's name."""
    with needing("ReLoRA"):
        from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            for adapter in (*layer.lora_A, *layer.lora_embedding_A):
                yield clean_name(name), layer, adapter


def check_mergeable(model: nn.Module) -> None:
    """Refuse a model without LoRA, or with adapters that cannot be merged exactly.

    Args:
        model: before wrapping.

    Raises:
        ValueError: naming the setting, what was given, and what is allowed.
    """
    found = list(adapters(model))
    if not found:
        raise ValueError(
            "model.peft_config: got none, relora needs LoRA: for example {peft_type: LORA, "
            "task_type: CAUSAL_LM, r: 64, lora_alpha: 64, target_modules: all-linear}"
        )
    held = [id(weight) for _, weight in model.named_parameters(remove_duplicate=False)]
    for name, layer, adapter in found:
        told = _obstacle(layer, adapter, held)
        if told is not None:
            raise ValueError(f"{told} (relora, in {name})")


def _obstacle(layer: "LoraLayer", adapter: str, held: list[int]) -> str | None:
    """Why this layer's adapter cannot be merged exactly and begun anew; None if it can."""
    from peft.tuners.lora import Linear

    if not isinstance(layer, Linear):
        return (
            f"model.peft_config.target_modules: got {type(layer).__name__}, allowed: plain linear "
            "layers"
        )
    if layer.lora_variant:
        return "model.peft_config.use_dora: got true, allowed: false. A magnitude is not merged"
    if layer.lora_bias[adapter]:
        return "model.peft_config.lora_bias: got true, allowed: false"
    if len(layer.lora_A) > 1:
        return f"model: got the adapters {', '.join(layer.lora_A)}, allowed: one"
    weight = layer.get_base_layer().weight
    if weight.dtype not in _EXACT:
        return (
            f"model.master_weights_dtype: got {weight.dtype}, allowed: none, which is float32. A "
            "merge changes weights by less than the last bit of a shorter one"
        )
    if held.count(id(weight)) > 1:
        return (
            "model.peft_config.target_modules: got a weight that another layer uses too (tied "
            "embeddings, layer_replication), allowed: weights of one layer"
        )
    return None


@torch.no_grad()
def restart(model: nn.Module, optimizer: Optimizer, prune: float, seed: int, batch: int) -> float:
    """Merge all adapters into their base weights and begin them anew.

    Args:
        model: with peft's LoRA; sharded by FSDP2, or the same on all ranks.
        optimizer: that of the adapters.
        prune: share of a parameter's elements whose moments become 0.
        seed: of the new A, together with the batch and the layer's name.
        batch: that the run is at.

    Returns:
        The share of the moments that is 0 now.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # while weights are gathered, modules show others than are trained
    zeros, total = torch.zeros(()), 0
    for name, layer, adapter in adapters(model):
        left, right = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
        base = layer.get_base_layer().weight
        change = low_rank(_whole(left), _whole(right), layer.scaling[adapter], base.dtype)
        _local(base).add_(_share(change.T if layer.fan_in_fan_out else change, base))
        generator = seeded_generator(seed, "relora", batch, name)
        _local(right).copy_(_share(first_right(right, generator), right))
        _local(left).zero_()
        for moments in (_moments(optimizer, parameter) for parameter in (left, right)):
            smallest = find_smallest(_whole(moments[0]), prune) if moments else None
            for moment in moments:
                pruned = _whole(moment).masked_fill(smallest, 0.0)
                _local(moment).copy_(_share(pruned, moment))
                zeros, total = zeros.to(pruned.device) + (pruned == 0).sum(), total + pruned.numel()
    return float(zeros) / max(total, 1)


def low_rank(left: Tensor, right: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """What an adapter adds to a weight: scaling * left @ right, in the weight's dtype.

    Args:
        left: [outputs, rank], peft's B.
        right: [rank, inputs], peft's A.
        scaling: peft's, alpha over rank, or over its square root (rsLoRA).
        dtype: of the product, whatever TF32 and autocast say.
    """
    return bmm(left.to(dtype), right.to(dtype)) * scaling


def first_right(like: Tensor, generator: torch.Generator) -> Tensor:
    """An A as peft draws it by default, from random numbers of the CPU's: the same everywhere."""
    drawn = torch.empty(like.shape, dtype=like.dtype)
    return nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator).to(like.device)


def find_smallest(values: Tensor, share: float) -> Tensor:
    """Which round(share * n) of n numbers are smallest by their magnitudes, as bool.

    Of equal ones the first are taken, so that all ranks take the same.
    """
    flat = values.flatten()
    smallest = flat.abs().argsort(stable=True)[: math.floor(share * flat.numel() + 0.5)]
    found = torch.zeros_like(flat, dtype=torch.bool)
    return found.index_fill_(0, smallest, True).view(values.shape)


def _moments(optimizer: Optimizer, parameter: Tensor) -> list[Tensor]:
    """What the optimizer keeps for each element of a parameter, the mean of its gradients first."""
    kept = optimizer.state.get(parameter, {}).values()
    return [own for own in kept if isinstance(own, Tensor) and own.shape == parameter.shape]


def _whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 has sharded, gathered (collective); another as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, to write to."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _share(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of what all ranks have, as another tensor is sharded."""
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    same = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return same.redistribute(placements=like.placements).to_local()
