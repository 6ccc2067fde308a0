"""Fused Triton kernels: Monarch fold and gradient map, unit norms, SwiGLU with statistics.

The kernels take plain tensors and know nothing of the rest of the package. The public names are
loaded when they are first asked for, so that asking `unavailable_reason` works without triton.
The function `swiglu` is in the module of that name, which is why it cannot be one of them:

    from apex_composer.triton_kernels import MonarchBatch, unit_square_sums
    from apex_composer.triton_kernels.swiglu import swiglu
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apex_composer.triton_kernels.availability import (
        is_available,
        monarch_unavailable_reason,
        unavailable_reason,
    )
    from apex_composer.triton_kernels.monarch import MonarchBatch
    from apex_composer.triton_kernels.norms import unit_square_sums

__all__ = [
    "MonarchBatch",
    "is_available",
    "monarch_unavailable_reason",
    "unavailable_reason",
    "unit_square_sums",
]

_MODULES = {
    "MonarchBatch": "monarch",
    "is_available": "availability",
    "monarch_unavailable_reason": "availability",
    "unavailable_reason": "availability",
    "unit_square_sums": "norms",
}


def __getattr__(name: str) -> Any:
    """Import a public name's module on first use."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
