"""The callback `held_memory`: bytes that the optimizer and the method hold beside the model."""

import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from weakref import ReferenceType, WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from apex_composer.extras import needing
from apex_composer.settings import check_positive

with needing("HeldMemory"):
    from composer import Trainer
    from composer.core import Callback, Engine, State
    from composer.loggers import Logger

# What an algorithm may point to without holding it.
_OTHERS = (
    *(nn.Module, State, Logger, Engine, Trainer, torch.utils.data.DataLoader, ReferenceType),
    *(
        WeakSet,
        type,
        types.ModuleType,
        types.FunctionType,
        types.MethodType,
        str,
        bytes,
        int,
        float,
    ),
)
# In the names of parameters that peft adds to a model: LoRA's factors, DoRA's magnitudes.
ADDED = ".lora_"


class HeldMemory(Callback):
    """Logs `held/optimizer_bytes` and `held/method_bytes` of this rank, by what is alive.

    The first are tensors of the optimizers: moments, projections, masters. The second are those
    that only the algorithms hold (operators with their moments, copies of rows, masks, averages),
    and what peft adds to the model. The model's other weights, its buffers and the gradients count
    nowhere. It looks between two steps, first after the first one.

    Args:
        interval: batches between two looks. Default: 100.

    Raises:
        ValueError: for an interval below 1.
    """

    def __init__(self, interval: int = 100) -> None:
        self.interval = check_positive("held_memory: interval", interval)

    def batch_start(self, state: State, logger: Logger) -> None:
        """Count after batches 1, 1 + interval and so on."""
        if state.timestamp.batch.value % self.interval == 1 % self.interval:
            logger.log_metrics(held_bytes(state))


def held_bytes(state: State) -> dict[str, int]:
    """The metrics of `HeldMemory`, counted now."""
    named = list(state.model.named_parameters())
    added = [parameter for name, parameter in named if ADDED in name]
    own = [parameter for name, parameter in named if ADDED not in name]
    gradients = [parameter.grad for _, parameter in named if parameter.grad is not None]
    model = storages([*own, *state.model.buffers(), *gradients])
    optimizer = {
        place: size
        for place, size in storages(tensors_in(state.optimizers)).items()
        if place not in model | storages(added)
    }
    method = storages([*added, *tensors_in(state.algorithms)])
    sizes = (size for place, size in method.items() if place not in model | optimizer)
    return {"held/optimizer_bytes": sum(optimizer.values()), "held/method_bytes": sum(sizes)}


def storages(tensors: Iterable[Tensor]) -> dict[tuple[str, int], int]:
    """Bytes of the memory behind tensors, each once, by device and address."""
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    found = ((str(t.device), t.untyped_storage()) for t in local)
    return {(device, storage.data_ptr()): storage.nbytes() for device, storage in found}


def tensors_in(root: Any) -> Iterator[Tensor]:
    """Yield all tensors that containers and plain objects hold, at any depth."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, _OTHERS):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            yield thing
        else:
            waiting += _parts(thing)


def _parts(thing: Any) -> list[Any]:
    if isinstance(thing, Mapping):
        return [*thing.keys(), *thing.values()]
    if isinstance(thing, list | tuple | set | frozenset):
        return list(thing)
    slots = [getattr(thing, name, None) for name in getattr(thing, "__slots__", ())]
    return [*getattr(thing, "__dict__", {}).values(), *slots]
