"""APEX (Advantageous Parameter EXpansion training, arXiv 2505.24241) for Composer and PyTorch.

The public names are loaded when they are first asked for: the core works where only torch is
installed, and the command line starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apex_composer.algorithm import APEX
    from apex_composer.expander import Expander
    from apex_composer.fused_swiglu import FusedSwiGLU
    from apex_composer.monarch import MonarchFactors
    from apex_composer.scheduler import StagewiseScheduler
    from apex_composer.sites import Group, Site, find_sites

__version__ = "0.1.0"
__all__ = [
    "APEX",
    "Expander",
    "FusedSwiGLU",
    "Group",
    "MonarchFactors",
    "Site",
    "StagewiseScheduler",
    "find_sites",
]

_MODULES = {
    "APEX": "algorithm",
    "Expander": "expander",
    "FusedSwiGLU": "fused_swiglu",
    "Group": "sites",
    "MonarchFactors": "monarch",
    "Site": "sites",
    "StagewiseScheduler": "scheduler",
    "find_sites": "sites",
}


def __getattr__(name: str) -> Any:
    """Import a public name's module on first use."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
