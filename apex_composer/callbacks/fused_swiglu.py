"""The callback `fused_swiglu`: the kernel that APEX turns on, for runs without it."""

from typing import Any

from apex_composer.extras import needing
from apex_composer.model.fused_swiglu import FUSED_SWIGLU, FusedSwiGLU
from apex_composer.settings import check_choice, check_keys

with needing("FusedSwiGLUCallback"):
    from composer.core import Callback, State
    from composer.loggers import Logger


class FusedSwiGLUCallback(Callback):
    """The Llama family's SwiGLU in one kernel, for runs without APEX.

    llm-foundry's callback `fused_swiglu`. A comparison of APEX with an ordinary run is fair when
    both have the same SwiGLU: APEX turns it on by itself where the kernel runs.

    Args:
        setting: True, False, or `auto` for only where the kernel runs. Default True.

    Raises:
        ValueError: for another setting.
        TypeError: for unknown settings.
    """

    def __init__(self, setting: bool | str = True, **unknown: Any):
        check_keys("fused_swiglu", unknown, ("setting",))
        check_choice("fused_swiglu: setting", setting, FUSED_SWIGLU)
        self.setting = setting
        self._fused: FusedSwiGLU | None = None

    def init(self, state: State, logger: Logger) -> None:
        """Replace the forward of the model's MLPs.

        Raises:
            ValueError: with True, where the kernel cannot run or the model has no SwiGLU.
        """
        device = "cuda" if state.device.name == "gpu" else state.device.name
        self._fused = FusedSwiGLU(state.model, self.setting, device=device)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Say where a compiled model keeps its own."""
        self._fused.log_compiled(state.model)

    def close(self, state: State, logger: Logger) -> None:
        """Give the MLPs their own forward back."""
        if self._fused is not None:
            self._fused.remove()
