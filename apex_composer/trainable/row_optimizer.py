"""AdamW for the trained rows, each of which counts its own steps."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from apex_composer.operators.main_optimizer import followed
from apex_composer.trainable.rows import Rows, carry

_NAMES = ("exp_avg", "exp_avg_sq", "steps")


class RowAdamW(Optimizer):
    """AdamW on the copies of trained rows, with the settings of the user's optimizer.

    A row that is new in a stage begins with moments of zero and a bias correction of its own; the
    moments of rows that stay trained are kept:
        m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,
        w <- (1 - decay) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    with decay = lr * weight_decay, or lr / initial_lr * weight_decay for Composer's DecoupledAdamW.

    Args:
        rows: the stage's.
        main: the user's AdamW or DecoupledAdamW.
        places: for each of the rows, the param group of `main` whose settings it follows.

    Raises:
        ValueError: for another optimizer.
    """

    def __init__(self, rows: Sequence[Rows], main: Optimizer, places: Sequence[int]):
        check_main(main)
        self._main, self._places = main, sorted(set(places))
        self._axes: dict[Tensor, int] = {p.copy: p.axis for own in rows for p in own.parts}
        groups = [
            {
                "params": [
                    p.copy
                    for own, at in zip(rows, places, strict=True)
                    if at == place
                    for p in own.parts
                ]
            }
            for place in self._places
        ]
        super().__init__(groups, {"lr": 0.0, "betas": (0.9, 0.95), "eps": 1e-8, "decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of all rows that have a gradient."""
        for group, place in zip(self.param_groups, self._places, strict=True):
            theirs = self._main.param_groups[place]
            group.update(followed(theirs, 1.0), decay=_decay(self._main, theirs))
            for copy in group["params"]:
                if copy.grad is not None:
                    self._step(copy, group)

    def _step(self, copy: Tensor, group: Mapping[str, Any]) -> None:
        (first, second), (mean, square, steps) = group["betas"], self.moments(copy)
        gradient = -copy.grad if group["maximize"] else copy.grad
        steps.add_(1)
        steps = (
            steps.double() if copy.dim() == 1 else steps.double().unsqueeze(1 - self._axes[copy])
        )
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = [(1 - beta**steps).to(copy.dtype) for beta in (first, second)]
        denominator = square.div(scale[1]).sqrt_().add_(group["eps"])
        copy.mul_(1 - group["decay"])
        copy.addcdiv_(mean / scale[0], denominator, value=-float(group["lr"]))

    def moments(self, copy: Tensor) -> list[Tensor]:
        """Mean and mean square of a copy's gradients, and the steps of each of its rows."""
        if not self.state[copy]:
            self.state[copy].update(_no_moments(copy, self._axes[copy]))
        return [self.state[copy][name] for name in _NAMES]

    def moved(self, old: Rows, new: Rows) -> dict[Tensor, dict[str, Tensor]]:
        """The moments of the rows that stay trained, for another stage's copies; theirs are gone.

        Args:
            old: rows of this optimizer's stage.
            new: the same site's rows of the next stage.

        Returns:
            State by copy, of rows that are new all zero; empty where no step was taken.
        """
        before = [self.state.pop(part.copy, None) for part in old.parts]
        if not any(before):
            return {}
        none = [_no_moments(part.copy, part.axis) for part in old.parts]
        before = [own or empty for own, empty in zip(before, none, strict=True)]
        after = [_no_moments(part.copy, part.axis) for part in new.parts]
        for name in _NAMES:
            carry(old, new, [own[name] for own in before], [own[name] for own in after])
        return {part.copy: own for part, own in zip(new.parts, after, strict=True)}


def _no_moments(copy: Tensor, axis: int) -> dict[str, Tensor]:
    zeros = {name: torch.zeros_like(copy) for name in _NAMES[:2]}
    return {**zeros, _NAMES[2]: torch.zeros(copy.shape[axis], device=copy.device)}


def check_main(main: Optimizer) -> None:
    """Refuse an optimizer that AdamW on rows would not stand for.

    Raises:
        ValueError: naming those that are allowed.
    """
    kind = type(main).__name__
    if kind not in ("AdamW", "DecoupledAdamW") or any(g.get("amsgrad") for g in main.param_groups):
        raise ValueError(
            f"trainable: the optimizer is {kind}{' with amsgrad' if kind == 'AdamW' else ''}, "
            "allowed where only rows are trained: AdamW, decoupled_adamw (their own AdamW takes "
            "over its settings)"
        )


def _decay(main: Optimizer, group: Mapping[str, Any]) -> float:
    decay, rate = group.get("weight_decay", 0.0), float(group["lr"])
    if type(main).__name__ == "AdamW":
        return rate * decay
    initial = group.get("initial_lr", rate)
    return (rate / initial if initial else 1.0) * decay
