"""APEX (Advantageous Parameter EXpansion training, arXiv 2505.24241) for Composer and PyTorch.

The public names are loaded when they are first asked for: the core works where only torch is
installed, and the command line starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apex_composer.expander import Expander
    from apex_composer.model.fused_swiglu import FusedSwiGLU
    from apex_composer.model.sites import Group, Site, find_sites
    from apex_composer.ops.monarch import MonarchFactors
    from apex_composer.trainer.algorithm import APEX
    from apex_composer.trainer.scheduler import StagewiseScheduler

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
    "APEX": "trainer.algorithm",
    "Expander": "expander",
    "FusedSwiGLU": "model.fused_swiglu",
    "Group": "model.sites",
    "MonarchFactors": "ops.monarch",
    "Site": "model.sites",
    "StagewiseScheduler": "trainer.scheduler",
    "find_sites": "model.sites",
}


def __getattr__(name: str) -> Any:
    """Import a public name's module on first use."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
