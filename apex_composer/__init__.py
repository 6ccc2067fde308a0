"""APEX (Advantageous Parameter EXpansion training, arXiv 2505.24241) for Composer and PyTorch.

The names that need Composer (`APEX`, `StagewiseScheduler`) are loaded when they are first asked
for, so the core works where only torch is installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from apex_composer.expander import Expander
from apex_composer.monarch import MonarchFactors
from apex_composer.sites import Group, Site, find_sites

if TYPE_CHECKING:
    from apex_composer.algorithm import APEX
    from apex_composer.scheduler import StagewiseScheduler

__version__ = "0.1.0"
__all__ = [
    "APEX",
    "Expander",
    "Group",
    "MonarchFactors",
    "Site",
    "StagewiseScheduler",
    "find_sites",
]

_NEED_COMPOSER = {
    "APEX": "apex_composer.algorithm",
    "StagewiseScheduler": "apex_composer.scheduler",
}


def __getattr__(name: str) -> Any:
    """Import the Composer classes on first use."""
    if name in _NEED_COMPOSER:
        return getattr(import_module(_NEED_COMPOSER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
