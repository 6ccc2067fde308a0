"""Fused Triton kernels: Monarch fold and gradient map, unit norms, SwiGLU with statistics.

The kernels take plain tensors and know nothing of the rest of the package. What needs triton is
loaded when it is first asked for, so that asking `unavailable_reason` works without it. The
function `swiglu` is in the module of that name, which is why it cannot be one of the names here:

    from apex_composer.triton_kernels import MonarchBatch, unit_square_sums
    from apex_composer.triton_kernels.swiglu import swiglu
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from apex_composer.triton_kernels.availability import monarch_unavailable_reason, unavailable_reason

if TYPE_CHECKING:
    from apex_composer.triton_kernels.monarch import MonarchBatch
    from apex_composer.triton_kernels.norms import unit_square_sums

__all__ = ["MonarchBatch", "monarch_unavailable_reason", "unavailable_reason", "unit_square_sums"]

_NEED_TRITON = {"MonarchBatch": "monarch", "unit_square_sums": "norms"}


def __getattr__(name: str) -> Any:
    """Import a public name's module on first use."""
    if name in _NEED_TRITON:
        return getattr(import_module(f"{__name__}.{_NEED_TRITON[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
