"""Batched products in full float32, whatever the process allows for those of the model.

Composer turns TF32 on for the whole process (`DeviceGPU`), others call
`torch.set_float32_matmul_precision`, and a step may lie inside `torch.autocast`. A model's
activations bear that; operators, which are added to the weights and taken out again in every step,
would be off by 4e-4 instead of 1e-7.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch
from torch import Tensor


def bmm(left: Tensor, right: Tensor) -> Tensor:
    """left @ right for every matrix of a batch, computed in the dtype of the tensors.

    Args:
        left: [..., rows, inner].
        right: [..., inner, columns], same batch, dtype and device.

    Returns:
        [..., rows, columns]. Differentiable, but a backward pass is computed as precisely as
        the process allows then.
    """
    if not left.is_meta and torch.is_autocast_enabled(left.device.type):
        with torch.autocast(left.device.type, enabled=False):
            return bmm(left, right)
    with full_float32():
        return torch.matmul(left, right)


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside, products of float32 are computed in float32: neither in TF32 nor in bfloat16.

    What was set before is set again afterwards, also after an error. A GPU's product is given its
    precision when it is launched, so that nothing waits for its end. Threads take turns: the
    setting is the process's, and one would set again what it has read inside another's block.
    """
    with _TURN:
        before = _read()
        _write(_FULL)
        try:
            yield
        finally:
            _write(before)


_TURN = RLock()


if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    # Since torch 2.9 every backend has a setting of its own. The older, common one must be left
    # alone there: reading it raises as soon as anyone has set a backend's.
    _BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    _FULL = ("ieee", "ieee")

    def _read() -> tuple[str, ...]:
        return tuple(backend.fp32_precision for backend in _BACKENDS)

    def _write(precisions: tuple[str, ...]) -> None:
        for backend, precision in zip(_BACKENDS, precisions, strict=True):
            # "none" follows torch.backends.fp32_precision, which may be where it was read from.
            backend.fp32_precision = "none"
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision
else:
    _FULL = "highest"
    _read, _write = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
