"""The Llama family's SwiGLU in one kernel, which can count the channels' norms on its way.

Only `forward` of the MLP modules is replaced, on the instances: names, parameters and modules stay
what they are, so checkpoints do too. The numbers are those of eager mode (`triton_kernels.swiglu`).
Inside torch.compile the modules compute by their own forward, and their norms are counted by hooks.
"""

import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from apex_composer.model.sites import clean_name
from apex_composer.ops.dispatch import resolve, swiglu_kernel
from apex_composer.settings import check_choice

log = logging.getLogger(__name__)

FUSED_SWIGLU = (True, False, "auto")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# silu of torch, and of Hugging Face's table of activations.
_SILU = ("SiLU", "SiLUActivation")
_NAME = "fused_swiglu_forward"  # of the forward that is put on instances here

# Given the name of an MLP's channels and the gate: where the sums of squares go, and the mask; None
# for nowhere.
ReserveNorms = Callable[[str, Tensor], tuple[Tensor, Tensor | None] | None]


def find_swiglus(model: nn.Module) -> dict[str, nn.Module]:
    """MLP modules that compute down(silu(gate(x)) * up(x)), by their names without wrappers'.

    Others that have the same parts (FalconH1's multiplies them by numbers of its own), and those
    whose forward somebody else has replaced on the instance, are left alone.

    Args:
        model: plain or wrapped.
    """
    return {
        clean_name(name): module
        for name, module in model.named_modules()
        if all(isinstance(getattr(module, child, None), nn.Module) for child in _PROJECTIONS)
        and type(getattr(module, "act_fn", None)).__name__ in _SILU
        and getattr(module.__dict__.get("forward"), "__name__", _NAME) == _NAME
        and computes_swiglu(module)
    }


class _Parts:
    """An MLP whose projections are simple functions, and which has no other modules or tensors."""

    gate_proj, up_proj, down_proj = (staticmethod(f) for f in (torch.sin, torch.cos, torch.exp))
    act_fn = staticmethod(nn.functional.silu)

    def __init__(self, module: nn.Module):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, nn.Module | Tensor):
            raise AttributeError(name)
        return value


def computes_swiglu(module: nn.Module) -> bool:
    """Whether the forward of a module's class is down(silu(gate(x)) * up(x)), and nothing beside.

    It is tried with functions in place of the projections.
    """
    x = torch.linspace(-2, 2, 6, dtype=torch.float64).view(1, 2, 3)
    parts = _Parts(module)
    expected = parts.down_proj(parts.act_fn(parts.gate_proj(x)) * parts.up_proj(x))
    try:
        found = type(module).forward(parts, x)
    except Exception:  # of a module that needs more than that
        return False
    return isinstance(found, Tensor) and torch.equal(found, expected)


class FusedSwiGLU:
    """Replaces the forward of a model's SwiGLU modules until `remove()`.

    Modules that are fused already stay as they are, but for a collector, which takes them over: a
    run may have both the callback `fused_swiglu` and APEX, in any order.

    Args:
        model: plain or wrapped.
        setting: True, or `auto` for only where the kernel runs. Default `auto`.
        device: where the model will run; default that of its parameters.
        collector: function that says in every forward pass where the norms of the channels go,
            for example `expander.assessment.reserve_norms`; default none.

    Raises:
        ValueError: with True, where the kernel cannot run or the model has no SwiGLU.
    """

    def __init__(
        self,
        model: nn.Module,
        setting: bool | str = "auto",
        *,
        device: torch.device | str | None = None,
        collector: ReserveNorms | None = None,
    ):
        check_choice("fused_swiglu", setting, FUSED_SWIGLU)
        self.modules = find_swiglus(model) if setting is not False else {}
        device = torch.device(device or next(model.parameters()).device)
        reason = _reason_against(self.modules, device, setting)
        if reason is not None:
            if setting is True:
                raise ValueError(f"fused_swiglu: got true, but {reason}. Allowed here: false, auto")
            log.info("apex: SwiGLU is not fused, because %s", reason)
            self.modules = {}
        self._forwards = {}
        for name, module in self.modules.items():
            if collector is not None or "forward" not in module.__dict__:
                forward = MethodType(_fused_forward(module, name, collector), module)
                module.forward = self._forwards[name] = forward

    def log_compiled(self, model: nn.Module) -> None:
        """Say, if so, that a model, as the trainer calls it, computes by its own SwiGLU."""
        if self.modules and hasattr(model.forward, "_torchdynamo_orig_callable"):
            log.info("apex: SwiGLU is the model's own, which torch.compile compiles")

    def remove(self) -> None:
        """Give the modules their own forward back, where it was replaced by this object."""
        for name, forward in self._forwards.items():
            if self.modules[name].__dict__.get("forward") == forward:
                del self.modules[name].forward
        self.modules, self._forwards = {}, {}


def _reason_against(
    modules: dict[str, nn.Module], device: torch.device, setting: bool | str
) -> str | None:
    if setting is False:
        return "it is turned off"
    if not modules:
        return f"the model has no modules with {', '.join(_PROJECTIONS)} and SiLU"
    try:
        chosen = resolve("triton" if setting is True else "auto", device)
    except ValueError as error:
        return str(error)
    return None if chosen == "triton" else f"the kernel does not run on {device}"


def _fused_forward(module: nn.Module, name: str, collector: ReserveNorms | None) -> Any:
    swiglu = swiglu_kernel()

    def fused_swiglu_forward(self: nn.Module, x: Tensor) -> Tensor:
        # torch.compile fuses the module's own into one kernel too, and would break the graph here.
        if torch.compiler.is_compiling():
            return type(self).forward(self, x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        # A deep copy of the model has this forward too, and must not count.
        counting = collector is not None and self is module
        reserved = collector(f"{name}.channels", gate) if counting else None
        return self.down_proj(swiglu(gate, up, *(reserved or (None, None))))

    return fused_swiglu_forward
