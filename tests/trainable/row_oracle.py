"""Training of some rows by autograd through W_eff: every row is a leaf of its own.

None of the package's code is used: a dense T, index_add, and torch's AdamW, whose state each row
keeps as long as it stays trained.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from oracle import dense_operator
from torch import Tensor, nn
from torch.func import functional_call


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
        self.optimizer = torch.optim.AdamW(
            [p for name, p in model.named_parameters() if name in whole] or [torch.zeros(1)],
            **options,
        )
        self.row_optimizers: dict[tuple, torch.optim.AdamW] = {}
        self.factors: torch.optim.AdamW | None = None

    def begin_stage(self, trained: Mapping[tuple[str, int], Sequence[int]], operators: list[dict]):
        """Fuse, then train the given rows.

        Args:
            trained: indices along an axis, by the parameter's name and the axis.
            operators: as of `Oracle.begin_stage`.
        """
        with torch.no_grad():
            for name, value in self.effective().items():
                self.model.get_parameter(name).copy_(value)
        keys = {(name, axis, i) for (name, axis), rows in trained.items() for i in rows}
        kept = {key: o for key, o in self.row_optimizers.items() if key in keys}
        self.rows, self.row_optimizers = {}, {}
        for name, axis, i in sorted(keys):
            key = name, axis, i
            value = self.model.get_parameter(name).detach().select(axis, i).clone()
            self.rows[key] = nn.Parameter(value)
            optimizer = torch.optim.AdamW([self.rows[key]], **self.options)
            if key in kept:
                optimizer.load_state_dict(kept[key].state_dict())
            self.row_optimizers[key] = optimizer
        self.operators = [
            {
                **o,
                "left": nn.Parameter(o["left"].clone()),
                "right": nn.Parameter(o["right"].clone()),
            }
            for o in operators
        ]
        leaves = [o[side] for o in self.operators for side in ("left", "right")]
        self.factors = (
            torch.optim.AdamW(leaves, **{**self.options, "weight_decay": 0.0}) if leaves else None
        )

    def effective(self) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for (name, axis, i), row in self.rows.items():
            weight = values.get(name, self.model.get_parameter(name).detach())
            index = torch.tensor([i])
            values[name] = weight.index_copy(axis, index, row.unsqueeze(axis))
        for operator in self.operators:
            dense = dense_operator(operator["left"], operator["right"])
            positive, negative = operator["positive"], operator["negative"]
            base = {name: values[name] for name in operator["names"]}
            for name, weight in base.items():
                if operator["axis"] == 1 and weight.dim() == 2:
                    update = (dense @ weight[:, positive].t()).t()
                    values[name] = weight.index_add(1, negative, update)
                else:
                    values[name] = weight.index_add(0, negative, dense @ weight[positive])
        return values

    def step(self, loss_of: Callable, lr: float) -> None:
        everything = [self.optimizer, *self.row_optimizers.values()]
        everything += [self.factors] if self.factors else []
        for optimizer in everything:
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = lr
        loss_of(lambda **kw: functional_call(self.model, self.effective(), kwargs=kw)).backward()
        for optimizer in everything:
            optimizer.step()
