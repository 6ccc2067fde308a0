"""What a batch of Monarch operators refuses, before anything is launched."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

PRECISIONS = ("tf32x3", "ieee")
_NAMES = ("weights", "lefts", "rights", "advantageous", "disadvantageous")


def check_batch(*tensors: Sequence[Tensor], axis: int, input_precision: str) -> None:
    """Raise ValueError unless W, L, R, P, N of a batch fit together.

    Args:
        tensors: weights, lefts, rights, advantageous, disadvantageous.
        axis: 0 or 1.
        input_precision: see MonarchBatch.
    """
    if axis not in (0, 1):
        raise ValueError(f"axis is {axis!r}, allowed: 0 (rows) and 1 (columns)")
    if input_precision not in PRECISIONS:
        raise ValueError(
            f"input_precision is {input_precision!r}, allowed: {', '.join(PRECISIONS)}"
        )
    counts = {name: len(own) for name, own in zip(_NAMES, tensors, strict=True)}
    if len(set(counts.values())) != 1 or not tensors[0]:
        raise ValueError(f"one of each per matrix, and at least one matrix: {counts}")
    for name, own in zip(_NAMES, tensors, strict=True):
        _check_alike(name, own, tensors[0][0].device)
    size = _check_factors(tensors[1][0], tensors[2][0])
    _check_weight(tensors[0][0], axis, size)
    _check_indices(size, *tensors[3:])


class Form(NamedTuple):
    """What the kernels have to know of a tensor beside its address."""

    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Form":
        """The form of a tensor as it is now."""
        return cls(tensor.dtype, tensor.device, tensor.shape, tensor.stride())

    def effective(self) -> "Form":
        """The stride of an axis of length 1 means nothing, and torch lets it be anything."""
        pairs = zip(self.shape, self.stride, strict=True)
        stride = tuple(stride if size > 1 else 1 for size, stride in pairs)
        return self._replace(shape=tuple(self.shape), stride=stride)


def check_moved(place: int, tensors: Sequence[Tensor], form: Form) -> None:
    """Raise ValueError where tensors that lie elsewhere now are not what they were at first.

    Args:
        place: of their kind: 0 weights, 1 lefts, 2 rights, 3 advantageous, 4 disadvantageous.
        tensors: all of the kind.
        form: of all of them at first.
    """
    for i, tensor in enumerate(tensors):
        for what, found, wanted in _differences(tensor, form):
            raise ValueError(
                f"{_NAMES[place]}[{i}] has {what} {found} now and had {wanted} when the batch was "
                "made, and its kernels rely on it. Allowed: to move tensors as they are. Convert "
                "or transpose weights between stages (or make the batch anew)"
            )


def check_gradients(form: Form, count: int, gradients: Sequence[Tensor | None]) -> None:
    """Raise ValueError unless there is a gradient like its weight, or None, for every weight.

    Args:
        form: of the weights.
        count: of the weights.
        gradients: of the weights.
    """
    if len(gradients) != count:
        raise ValueError(
            f"{len(gradients)} gradients for {count} weights: give one of each, None where "
            "a weight has no gradient"
        )
    for place, gradient in enumerate(gradients):
        for what, found, wanted in () if gradient is None else _differences(gradient, form):
            raise ValueError(
                f"gradients[{place}] has {what} {found}, its weight has {wanted}: the kernels "
                "need them alike (for strides, copy the gradient: torch.empty_like(weight)"
                ".copy_(gradient))"
            )


def _differences(tensor: Tensor, form: Form) -> list[tuple[str, Any, Any]]:
    """Every property that is not as in the form: its name, what it is and what it should be."""
    found = Form.of(tensor)
    if found == form:  # every step asks this of every gradient
        return []
    pairs = zip(Form._fields, found.effective(), form.effective(), strict=True)
    return [(what, own, wanted) for what, own, wanted in pairs if own != wanted]


def _check_alike(name: str, tensors: Sequence[Tensor], device: torch.device) -> None:
    dtype = torch.int64 if name.endswith("advantageous") else torch.float32
    for place, tensor in enumerate(tensors):
        if tensor.dtype != dtype:
            raise ValueError(f"{name}[{place}] is {tensor.dtype}, the kernels take {dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}[{place}] is on {tensor.device}, weights[0] on {device}")
        for what, found, wanted in _differences(tensor, Form.of(tensors[0])):
            raise ValueError(
                f"{name}[{place}] has {what} {found}, {name}[0] has {wanted}: make one batch "
                "for each kind of matrix"
            )
        if name != "weights" and not tensor.is_contiguous():
            raise ValueError(
                f"{name}[{place}] is not contiguous: give {name}[{place}].contiguous()"
            )


def _check_factors(left: Tensor, right: Tensor) -> int:
    """Their n."""
    shapes = tuple(left.shape), tuple(right.shape)
    p, q = right.shape[:2] if right.dim() == 3 else (0, 0)
    if p * q == 0 or shapes != ((q, p, p), (p, q, q)):
        raise ValueError(f"factors of shape {shapes}, allowed: L [q, p, p] and R [p, q, q]")
    return p * q


def _check_weight(weight: Tensor, axis: int, size: int) -> None:
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weights of shape {tuple(weight.shape)}, allowed: [rows, columns]")
    if weight.shape[axis] < 2 * size:
        raise ValueError(
            f"weights of shape {tuple(weight.shape)} cannot have {size} advantageous and {size} "
            f"disadvantageous indices along axis {axis}"
        )
    if min(Form.of(weight).effective().stride) != 1:
        raise ValueError(
            f"weights of strides {tuple(weight.stride())}, allowed: rows or columns that are "
            "contiguous in memory"
        )


def _check_indices(size: int, *indices: Sequence[Tensor]) -> None:
    for name, own in zip(_NAMES[3:], indices, strict=True):
        if tuple(own[0].shape) != (size,):
            raise ValueError(
                f"{name} of shape {tuple(own[0].shape)}, the factors are for [{size}] indices"
            )
