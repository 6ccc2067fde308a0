"""Whether tensors were written since, by autograd's version counters: no waiting for a device."""

from collections.abc import Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.weak import TensorWeakRef


def version(tensor: Tensor) -> tuple[int, ...]:
    """Other numbers once a tensor is written in place, or its memory is replaced.

    Writes through `tensor.data` are not counted by autograd, and so not seen here.
    """
    local = _local(tensor)
    return tensor._version, local._version, local.data_ptr()


def versions(tensors: Iterable[Tensor]) -> list[tuple[int, ...]]:
    """The `version` of every tensor."""
    return [version(tensor) for tensor in tensors]


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


class Gradients:
    """Remembers the gradients of parameters as they are, without keeping them alive.

    By object, not by address: the memory of a gradient that was dropped is soon the next one's.
    """

    def __init__(self, parameters: Iterable[Tensor] = ()):
        self._seen = [
            (parameter, TensorWeakRef(parameter.grad), version(parameter.grad))
            for parameter in parameters
            if parameter.grad is not None and _local(parameter.grad).numel() > 0
        ]

    def any_unchanged(self) -> bool:
        """Whether any of them is still its parameter's gradient, and has not been written since."""
        return any(
            parameter.grad is not None
            and parameter.grad is gradient()
            and version(parameter.grad) == before
            for parameter, gradient, before in self._seen
        )
