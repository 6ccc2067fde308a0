"""AdamW for the trained rows, each of which counts its own steps."""

from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apex_composer.operators.main_optimizer import followed
from apex_composer.trainable.rows import Rows, carry

_NAMES = ("exp_avg", "exp_avg_sq", "steps")

Moments = MutableMapping[Tensor, dict[str, Tensor]]


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
        places: the param group of `main` whose settings they follow, by the model's parameter.
        moments: by copy, kept up to date in place.

    Raises:
        ValueError: for another optimizer.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        main: Optimizer,
        places: Mapping[nn.Parameter, int],
        moments: Moments,
    ):
        check_main(main)
        self._main = main
        copies: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for part in (part for own in rows for part in own.parts):
            copies[places[part.shard.parameter], part.axis].append(part.copy)
        groups = [{"params": own, "place": p, "axis": axis} for (p, axis), own in copies.items()]
        super().__init__(groups, {"lr": 0.0, "betas": (0.9, 0.95), "eps": 1e-8, "decay": 0.0})
        self.state = moments

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of all rows that have a gradient."""
        for group in self.param_groups:
            theirs = self._main.param_groups[group["place"]]
            group.update(followed(theirs, 1.0), decay=_decay(self._main, theirs))
            for copy in group["params"]:
                if copy.grad is not None:
                    self._step(copy, group)

    def _step(self, copy: Tensor, group: Mapping[str, Any]) -> None:
        axis, (first, second) = group["axis"], group["betas"]
        mean, square, steps = moments_of(self.state, copy, axis)
        gradient = -copy.grad if group["maximize"] else copy.grad
        steps.add_(1)
        steps = steps.double() if copy.dim() == 1 else steps.double().unsqueeze(1 - axis)
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = [(1 - beta**steps).to(copy.dtype) for beta in (first, second)]
        denominator = square.div(scale[1]).sqrt_().add_(group["eps"])
        copy.mul_(1 - group["decay"])
        copy.addcdiv_(mean / scale[0], denominator, value=-float(group["lr"]))

    def forget(self) -> None:
        """Let go of the copies, as their stage is over; others may still follow this optimizer."""
        self.param_groups.clear()


def moments_of(moments: Moments, copy: Tensor, axis: int) -> list[Tensor]:
    """Mean and mean square of a copy's gradients, and the steps of each of its rows."""
    if copy not in moments:
        moments[copy] = _no_moments(copy, axis)
    return [moments[copy][name] for name in _NAMES]


def move_moments(moments: Moments, old: Rows, new: Rows) -> None:
    """Give the moments of the rows that stay trained to another stage's copies; theirs are gone.

    Args:
        moments: by copy, changed in place; rows that are new get zeros, all where there were none.
        old: rows of the stage before.
        new: the same site's rows of the next stage.
    """
    before = [moments.pop(part.copy, None) for part in old.parts]
    if not any(before):
        return
    none = [_no_moments(part.copy, part.axis) for part in old.parts]
    before = [own or empty for own, empty in zip(before, none, strict=True)]
    after = [_no_moments(part.copy, part.axis) for part in new.parts]
    for name in _NAMES:
        carry(old, new, [own[name] for own in before], [own[name] for own in after])
    moments.update({part.copy: own for part, own in zip(new.parts, after, strict=True)})


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
