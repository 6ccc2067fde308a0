"""The private optimizer of the Monarch factors, which follows the user's own optimizer.

The factors never enter the main optimizer: Composer's checkpoint code fails on parameters that
are not the model's, and a checkpoint would no longer be an ordinary one.
"""

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from apex_composer.operators.main_optimizer import followed, param_group_places
from apex_composer.operators.operator import ExpansionOperator


class OperatorOptimizer:
    """AdamW without weight decay on L and R, with the main optimizer's lr, betas, eps, maximize.

    Every operator follows the param group that its site's weight is in, at every step, also where
    the bias that is expanded with the weight is in another group.

    Args:
        operators: the stage's.
        main: the user's optimizer, which holds the weights.
        lr_scale: the operators' learning rate over the main one, default 1.

    Raises:
        ValueError: as `param_group_places`.
    """

    def __init__(
        self, operators: Sequence[ExpansionOperator], main: Optimizer, lr_scale: float = 1.0
    ):
        self._operators, self._main, self._lr_scale = operators, main, lr_scale
        places = param_group_places([operator.site for operator in operators], main)
        factors: dict[int, list[Tensor]] = {place: [] for place in places}
        for operator, place in zip(operators, places, strict=True):
            factors[place] += operator.factors
        self._followed = list(factors)
        # One kernel for hundreds of small tensors on CUDA, one each instead of ten on the CPU.
        fused = operators[0].factors.left.device.type in ("cpu", "cuda")
        groups = [{"params": own} for own in factors.values()]
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=fused or None)

    def step(self) -> None:
        """One AdamW step on the factors from their `.grad`, then forget the gradients."""
        for group, place in zip(self._optimizer.param_groups, self._followed, strict=True):
            group.update(followed(self._main.param_groups[place], self._lr_scale))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def divide_gradients(self, scale: Tensor) -> None:
        """Divide the factors' gradients by what the loss was multiplied by."""
        for _, factor in self._named_factors():
            if factor.grad is not None:
                factor.grad.div_(scale)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """AdamW's moments by factor: {`<site>.left`: {step, exp_avg, exp_avg_sq}}, on the CPU."""
        moments = {}
        for name, factor in self._named_factors():
            state = self._optimizer.state.get(factor, {})
            moments[name] = dict(zip(state, to_cpu(state.values()), strict=True))
        return moments

    def load_state_dict(self, moments: dict[str, dict[str, Any]]) -> None:
        """Take over saved moments; torch puts each tensor where its factor lies."""
        own = self._optimizer.state_dict()
        names = {id(factor): name for name, factor in self._named_factors()}
        order = [names[id(f)] for group in self._optimizer.param_groups for f in group["params"]]
        own["state"] = {i: deepcopy(moments[name]) for i, name in enumerate(order) if moments[name]}
        self._optimizer.load_state_dict(own)

    def _named_factors(self) -> Iterator[tuple[str, Tensor]]:
        for operator in self._operators:
            yield f"{operator.site.name}.left", operator.factors.left
            yield f"{operator.site.name}.right", operator.factors.right


def to_cpu(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies on the CPU, as checkpoints hold them."""
    return [tensor.detach().to("cpu", copy=True) for tensor in tensors]
