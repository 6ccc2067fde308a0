"""Which part of a weight this rank holds: plain, DDP, FSDP1, FSDP2 and HSDP as one interval.

Every way of sharding that is supported cuts the row-major weight at flat positions: FSDP1
anywhere (in the middle of a row too), FSDP2 between rows. So a shard is an interval.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

from apex_composer.model.sites import Site


@dataclass(frozen=True, eq=False)
class Shard:
    """One weight or bias, and the flat interval of it that this rank holds.

    Attributes:
        name: the site's, for messages.
        parameter: the one that the module and the optimizer hold.
        shape: (rows, columns) of the whole weight; a bias has one column.
        start: first flat position of the row-major weight that this rank holds.
        stop: position behind the last; equal to `start` where this rank holds nothing.
        process_group: the ranks that hold one copy between them; None: this rank holds all of it.
        replicas: how many copies there are (HSDP).
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, int]
    start: int
    stop: int
    process_group: ProcessGroup | None = None
    replicas: int = 1

    def values(self) -> Tensor:
        """This rank's part, flat [stop - start]; in-place writes go to the parameter."""
        return self._flat(self.parameter)

    def gradient(self) -> Tensor | None:
        """This rank's part of the gradient, flat [stop - start], or None where there is none.

        Raises:
            ValueError: for a gradient in another precision than the weight's.
        """
        gradient = self.parameter.grad
        if gradient is None or self.start == self.stop:
            return None
        if gradient.dtype != self.parameter.dtype:
            raise ValueError(
                f"{self.name} has gradients in {gradient.dtype}, allowed: that of the weight, "
                f"{self.parameter.dtype}. Mapping them through the operators would lose their low "
                "bits: set `keep_low_precision_grads: false` in fsdp_config"
            )
        return self._flat(gradient)

    def _flat(self, tensor: Tensor) -> Tensor:
        with torch.no_grad():  # to_local() is the shard itself only without autograd
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
        flat = local.view(-1)
        if flat.numel() != self.stop - self.start:
            raise RuntimeError(
                f"{self.name}: this rank should hold {self.stop - self.start} numbers of it and "
                f"holds {flat.numel()}. The parameter was gathered or wrapped anew: begin the "
                "stage after wrapping, and step right after a backward pass"
            )
        return flat


def find_shards(sites: Sequence[Site]) -> list[list[Shard]]:
    """The shards of every site's weight and of the bias that is expanded with it.

    Gathered weights are resharded first: while they are gathered, modules show other parameters
    than the optimizer holds.

    Args:
        sites: those of `find_sites(model)` with the model as it is trained, wrapped.

    Returns:
        For every site one or two shards, in the order of `Site.parameters()`.

    Raises:
        ValueError: for sharding that APEX cannot work with, saying what to change.
    """
    reshard(sites)
    known = {
        id(parameter): held
        for model in _models(sites)
        for parameter, held in (*_held_by_fsdp1(model), *_held_by_fsdp2(model))
    }
    shards = [[_shard(site, p, known) for p in site.parameters()] for site in sites]
    for pair in shards:
        if len({shard.process_group for shard in pair}) > 1:
            raise ValueError(
                f"{pair[0].name} and its bias are sharded over different ranks, allowed: both over "
                "the same. Wrap the whole module with FSDP (no ignored parameters in it)"
            )
    return shards


def reshard(sites: Sequence[Site]) -> None:
    """Give up gathered copies of weights, so that writes to the shards are seen.

    Outside an optimizer step FSDP may still hold the copy that a forward pass without gradients
    gathered, and the next forward pass would use that one.

    Args:
        sites: some of every model whose weights are about to be read or written.
    """
    for model in _models(sites):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        for module in FSDP1.fsdp_modules(model):
            handle = module._handle
            # Before its first forward pass FSDP1 has nowhere to gather to.
            gathers = handle is not None and hasattr(handle.flat_param, "_full_param_padded")
            if gathers and not handle.needs_unshard():
                # Private, and the only way; imported where FSDP1 is in use only.
                from torch.distributed.fsdp._runtime_utils import _reshard

                _reshard(module, handle, True)


def _models(sites: Iterable[Site]) -> list[nn.Module]:
    return list(dict.fromkeys(site.model for site in sites if site.model is not None))


class _Held(NamedTuple):
    """What this rank holds of a parameter, as in `Shard`."""

    shape: torch.Size
    start: int
    stop: int
    process_group: ProcessGroup | None = None
    replicas: int = 1


def _held_by_fsdp1(model: nn.Module) -> Iterator[tuple[nn.Parameter, _Held]]:
    for module in FSDP1.fsdp_modules(model):
        handle = module._handle
        if handle is None:
            continue
        if not handle._use_orig_params:
            raise ValueError(
                "use_orig_params: got false, allowed with apex: true. FSDP hides the single "
                "weights otherwise: set `use_orig_params: true` in fsdp_config (its default), or "
                "FSDP_VERSION=2"
            )
        if handle._fsdp_extension is not None:
            raise ValueError(_tensor_parallel("a weight"))
        if not handle.uses_sharded_strategy:  # NO_SHARD, or a single rank
            continue
        flat, across = handle.flat_param, getattr(module, "_inter_node_pg", None)
        ranks = handle.process_group, 1 if across is None else across.size()
        for parameter, info, shape in zip(
            flat._params, flat._shard_param_infos, flat._shapes, strict=True
        ):
            start, stop = 0, 0
            if info.in_shard:
                start, stop = info.intra_param_start_idx, info.intra_param_end_idx + 1
            yield parameter, _Held(shape, start, stop, *ranks)


def _held_by_fsdp2(model: nn.Module) -> Iterator[tuple[nn.Parameter, _Held]]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            managed = module._get_fsdp_state()._fsdp_param_group
            for own in managed.fsdp_params if managed is not None else ():
                yield own.sharded_param, _held(own.sharded_param)


def _held(parameter: DTensor) -> _Held:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = parameter.device_mesh, parameter.placements
    cut = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if len(cut) != 1 or type(placements[cut[0]]) is not ShardPlacement or placements[cut[0]].dim:
        raise ValueError(_tensor_parallel(f"a weight placed as {tuple(placements)}"))
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    width = parameter.shape[1:].numel()
    start = offset[0] * width if shape[0] else 0
    ranks = mesh.get_group(cut[0]), mesh.size() // mesh.size(cut[0])
    return _Held(parameter.shape, start, start + shape[0] * width, *ranks)


def _shard(site: Site, parameter: nn.Parameter, known: Mapping[int, _Held]) -> Shard:
    bias = parameter is not site.weight
    held = known.get(id(parameter))
    if held is None:
        _check_plain(site, parameter, bias)
        held = _Held(parameter.shape, 0, parameter.numel())
    shape = held.shape[0], 1 if bias else held.shape[1]
    return Shard(site.name, parameter, shape, *held[1:])


def _check_plain(site: Site, parameter: nn.Parameter, bias: bool) -> None:
    if isinstance(parameter, DTensor):
        raise ValueError(_tensor_parallel(site.name))
    if parameter.dim() != (1 if bias else 2):
        raise ValueError(
            f"{site.name} has the shape {tuple(parameter.shape)} of a part of a weight, but no "
            "FSDP module holds it in the model that the sites were found in: call "
            "find_sites(model) with the outermost, wrapped model"
        )


def _tensor_parallel(what: str) -> str:
    return (
        f"{what} is cut by tensor parallelism, allowed with apex: FSDP, HSDP and DDP. Remove "
        "`tp_config` (parallelize_module) and shard with `fsdp_config` alone"
    )
