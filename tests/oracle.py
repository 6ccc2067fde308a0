"""Training of W and T by autograd through W_eff: an oracle that uses none of the package's code.

T is built as a dense matrix from explicit permutations, every step differentiates the loss with
respect to W_eff, and autograd carries that on to W, L and R.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call


def dense_operator(left: Tensor, right: Tensor) -> Tensor:
    """T = Pm L Pm^T R with Pm the permutation that turns [p, q] into [q, p]."""
    q, p, _ = left.shape
    order = torch.arange(p * q).reshape(p, q).t().flatten()
    permutation = torch.eye(p * q, dtype=left.dtype)[order]
    blocks_left, blocks_right = torch.block_diag(*left), torch.block_diag(*right)
    return permutation.t() @ blocks_left @ permutation @ blocks_right


class Oracle:
    """One model, its optimizer, and operators as explicit autograd leaves.

    Args:
        model: trained in place; holds the base weights W during a stage.
        optimizer: of the model's parameters.
        betas: of the operators' AdamW.
        eps: of the operators' AdamW.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, betas, eps: float):
        self.model, self.optimizer = model, optimizer
        self.betas, self.eps = betas, eps
        self.operators: list[dict] = []
        self.operator_optimizer = None

    def begin_stage(self, operators: list[dict]) -> None:
        """Fuse what there is and start with the given sets and factors.

        Args:
            operators: dicts of `names` (weight, and bias where expanded), `axis`, `positive`,
                `negative` (indices), `left`, `right` (initial factors).
        """
        self.fuse()
        self.operators = [
            {
                **o,
                "left": nn.Parameter(o["left"].clone()),
                "right": nn.Parameter(o["right"].clone()),
            }
            for o in operators
        ]
        factors = [o[side] for o in self.operators for side in ("left", "right")]
        self.operator_optimizer = torch.optim.AdamW(
            factors, lr=0.0, betas=self.betas, eps=self.eps, weight_decay=0.0
        )

    def fuse(self) -> None:
        """W <- W_eff."""
        with torch.no_grad():
            for name, value in self.effective().items():
                self.model.get_parameter(name).copy_(value)
        self.operators = []

    def effective(self) -> dict[str, Tensor]:
        """W_eff of every expanded parameter, differentiable in W, L and R."""
        values: dict[str, Tensor] = {}
        for operator in self.operators:
            dense = dense_operator(operator["left"], operator["right"])
            positive, negative = operator["positive"], operator["negative"]
            for name in operator["names"]:
                weight = values.get(name, self.model.get_parameter(name))
                if operator["axis"] == 1 and weight.dim() == 2:  # a bias has one axis
                    update = (dense @ weight[:, positive].t()).t()
                    values[name] = weight.index_add(1, negative, update)
                else:
                    values[name] = weight.index_add(0, negative, dense @ weight[positive])
        return values

    def step(
        self, losses: list[Callable], lr: float, clip: float | None, microbatches: int
    ) -> float:
        """One optimizer step; `losses` compute a microbatch's loss from `call(**inputs)`."""
        effective = self.effective()
        others = {name: p for name, p in self.model.named_parameters() if name not in effective}
        leaves = {name: value.detach().requires_grad_() for name, value in effective.items()}
        total = 0.0
        self.optimizer.zero_grad()
        for loss_of in losses:
            loss = (
                loss_of(lambda **kw: functional_call(self.model, leaves, kwargs=kw)) / microbatches
            )
            loss.backward()
            total += loss.item()
        gradients = {name: leaf.grad for name, leaf in leaves.items()}
        everything = [*gradients.values(), *(p.grad for p in others.values() if p.grad is not None)]
        if clip is not None:
            norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in everything]))
            for gradient in everything:
                gradient.mul_((clip / (norm + 1e-6)).clamp(max=1.0))
        if self.operators:
            self.operator_optimizer.zero_grad()
            torch.autograd.backward(
                [effective[name] for name in gradients], list(gradients.values())
            )
            self.operator_optimizer.param_groups[0]["lr"] = lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        if self.operators:
            self.operator_optimizer.step()
        return total
