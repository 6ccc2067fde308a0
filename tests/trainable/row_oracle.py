"""Training of some rows by autograd through W_eff: every row is a leaf of its own.

None of the package's code is used: a dense T, index_add, and torch's AdamW, whose state each row
keeps as long as it stays trained.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from oracle import dense_operator
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import AdamW


class RowOracle:
    """A model of which some rows are trained.

    Args:
        model: holds W_eff of what is not trained, and of what was.
        whole: names of parameters that are trained as they are.
        options: of AdamW.
    """

    def __init__(self, model: nn.Module, whole: Sequence[str], options: Mapping):
        self.model, self.options = model, options
        self.rows: dict[tuple[str, int, int], nn.Parameter] = {}
        self.operators: list[dict] = []
        self.optimizer = AdamW(
            [p for name, p in model.named_parameters() if name in whole] or [torch.zeros(1)],
            **options,
        )
        self.row_optimizers: dict[tuple, AdamW] = {}
        self.factors: AdamW | None = None

    def begin_stage(self, trained: Mapping[tuple[str, int], Sequence[int]], operators: list[dict]):
        """Fuse, then train the given rows.

        Args:
            trained: indices along an axis, by the parameter's name and the axis.
            operators: as of `Oracle.begin_stage`.
        """
        before = {name: value.detach() for name, value in self.effective().items()}
        self.write()
        keys = {(name, axis, i) for (name, axis), rows in trained.items() for i in rows}
        kept = {key: own for key, own in self.row_optimizers.items() if key in keys}
        self.rows, self.row_optimizers = {}, {}
        for name, axis, i in sorted(keys):
            key = name, axis, i
            values = before[name] if key in kept else wide(self.model.get_parameter(name))
            self.rows[key] = nn.Parameter(values.select(axis, i).clone())
            self.row_optimizers[key] = AdamW([self.rows[key]], **self.options)
            if key in kept:
                self.row_optimizers[key].load_state_dict(kept[key].state_dict())
        sides = ("left", "right")
        self.operators = [
            {**o, **{side: nn.Parameter(o[side].clone()) for side in sides}} for o in operators
        ]
        leaves = [o[side] for o in self.operators for side in sides]
        self.factors = AdamW(leaves, **{**self.options, "weight_decay": 0.0}) if leaves else None

    def effective(self) -> dict[str, Tensor]:
        """W_eff of every weight with trained rows, in full precision, differentiable in them."""
        values: dict[str, Tensor] = {}
        for (name, axis, i), row in self.rows.items():
            weight = values.get(name, wide(self.model.get_parameter(name)))
            values[name] = weight.index_copy(axis, torch.tensor([i]), row.unsqueeze(axis))
        for operator in self.operators:
            dense = dense_operator(operator["left"], operator["right"])
            positive, negative = operator["positive"], operator["negative"]
            for name in operator["names"]:
                weight = values[name]
                if operator["axis"] == 1 and weight.dim() == 2:
                    update = (dense @ weight[:, positive].t()).t()
                    values[name] = weight.index_add(1, negative, update)
                else:
                    values[name] = weight.index_add(0, negative, dense @ weight[positive])
        return values

    def write(self) -> None:
        """Put W_eff into the model, in the model's precision."""
        with torch.no_grad():
            for name, value in self.effective().items():
                self.model.get_parameter(name).copy_(value)

    def step(self, loss_of: Callable, lr: float | None = None, clip: float | None = None):
        """One step of everything; `loss_of` computes the loss from `call(**inputs)`."""
        everything = [self.optimizer, *self.row_optimizers.values()]
        everything += [self.factors] if self.factors else []
        for optimizer in everything:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] if lr is None else lr
        effective = self.effective()
        leaves = {name: value.detach().requires_grad_() for name, value in effective.items()}
        weights = {n: leaf.to(self.model.get_parameter(n).dtype) for n, leaf in leaves.items()}
        loss = loss_of(lambda **kw: functional_call(self.model, weights, kwargs=kw))
        loss.backward()
        gradients = [leaf.grad for leaf in leaves.values()]
        if clip is not None:
            self.clip(leaves, clip)
        torch.autograd.backward(list(effective.values()), gradients)
        for optimizer in everything:
            optimizer.step()
        return float(loss)

    def clip(self, leaves: Mapping[str, Tensor], largest: float) -> None:
        """By the norm of dLoss/dW_eff in the trained rows, and of what is trained as it is."""
        own = [leaves[name].grad.select(axis, i) for name, axis, i in self.rows]
        whole = [p.grad for p in self.optimizer.param_groups[0]["params"] if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in [*own, *whole]]))
        for gradient in [*whole, *(leaf.grad for leaf in leaves.values())]:
            gradient.mul_((largest / (norm + 1e-6)).clamp(max=1.0))


def wide(parameter: Tensor) -> Tensor:
    """The values in float32, or wider where they are."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
