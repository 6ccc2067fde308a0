"""APEX (Advantageous Parameter EXpansion training, arXiv 2505.24241) for Composer and PyTorch.

The public names are loaded when they are first asked for: the core works where only torch is
installed, and the command line starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apex_composer.expander import Expander as Expander
    from apex_composer.model.find_sites import find_sites as find_sites
    from apex_composer.model.fused_swiglu import FusedSwiGLU as FusedSwiGLU
    from apex_composer.model.sites import Group as Group
    from apex_composer.model.sites import Site as Site
    from apex_composer.ops.monarch import MonarchFactors as MonarchFactors
    from apex_composer.trainer.algorithm import APEX as APEX
    from apex_composer.trainer.scheduler import StagewiseScheduler as StagewiseScheduler

__version__ = "0.1.0"

_MODULES = {
    "APEX": "trainer.algorithm",
    "Expander": "expander",
    "FusedSwiGLU": "model.fused_swiglu",
    "Group": "model.sites",
    "MonarchFactors": "ops.monarch",
    "Site": "model.sites",
    "StagewiseScheduler": "trainer.scheduler",
    "find_sites": "model.find_sites",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    """Import a public name's module on first use."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
