"""Training by autograd through the effective weights, in float64: what any arm must come to.

Nothing of the package's operators is used: T is a dense product of block-diagonal matrices, weights
and factors are leaves, every step is torch's AdamW.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tiny_arms import Started
from torch import Tensor, nn
from torch.func import functional_call

Weights = Mapping[str, Tensor]


def exact_loss(model: nn.Module, batch: Tensor, weights: Weights | None = None) -> Tensor:
    """The mean over tokens, in float64 throughout."""
    inputs = {"input_ids": batch[:, :-1]}
    output = model(**inputs) if weights is None else functional_call(model, weights, (), inputs)
    return nn.functional.cross_entropy(output.logits.flatten(0, 1), batch[:, 1:].flatten())


def train_exactly(started: Started, places: Sequence[int], rate: float) -> None:
    """As `model.train`, with the loss in float64."""
    for place in places:
        started.optimizer.param_groups[0]["lr"] = rate
        started.optimizer.zero_grad(set_to_none=True)
        with started.varied.assessing():
            exact_loss(started.model, started.order.batch(place)).backward()
        started.varied.clip(1.0)
        started.optimizer.step()


def monarch(left: Tensor, right: Tensor) -> Tensor:
    """T = Pm L Pm^T R as a matrix (paper eq. 13): Pm puts number i * q + j at j * p + i."""
    (q, p, _), size = left.shape, left.shape[0] * left.shape[1]
    places = torch.arange(size).view(p, q).t().flatten()
    permutation = torch.eye(size, dtype=left.dtype)[places]
    return permutation.t() @ torch.block_diag(*left) @ permutation @ torch.block_diag(*right)


def expanded(weight: Tensor, axis: int, matrix: Tensor, strong: Tensor, weak: Tensor) -> Tensor:
    """W with W[N] + T W[P] for W[N], by a matrix that acts on all rows (or columns)."""
    whole = torch.eye(weight.shape[axis], dtype=weight.dtype)
    whole = whole.index_put((weak.unsqueeze(1), strong.unsqueeze(0)), matrix)
    return whole @ weight if axis == 0 else weight @ whole.t()


class Oracle:
    """A copy of an arm's weights that is trained beside it.

    Args:
        started: in float64, before its first step.
    """

    def __init__(self, started: Started):
        self._started = started
        self.base = {name: value.requires_grad_() for name, value in started.weights().items()}
        self._optimizer = torch.optim.AdamW(
            list(self.base.values()), betas=(0.9, 0.95), weight_decay=0.1
        )
        self._effective: Callable[[Weights], Weights] = dict

    def begin(
        self,
        effective: Callable[[Weights], Weights],
        factors: Sequence[Tensor],
        decay: float = 0.0,
        forget: bool = False,
    ) -> None:
        """A stage: the weights are fused, and new factors make the effective ones of them."""
        with torch.no_grad():
            for name, value in self.effective().items():
                self.base[name].copy_(value)
        if forget:
            self._optimizer.state.clear()
        self._effective, self._factors = effective, list(factors)
        self._of_factors = torch.optim.AdamW(self._factors, betas=(0.9, 0.95), weight_decay=decay)

    def adopt(self) -> None:
        """Take over weights and moments that the arm has set as the stage began, T = 0."""
        for name, value in self._started.model.named_parameters():
            self.base[name].data.copy_(value)
            for moment, own in self._optimizer.state.get(self.base[name], {}).items():
                own.copy_(self._started.optimizer.state[value][moment])

    def effective(self) -> Weights:
        """By name."""
        return self._effective(self.base)

    def train(self, places: Sequence[int], rate: float) -> None:
        """Steps of weights and factors; gradients are clipped by the norm of the effective ones."""
        for place in places:
            weights = self.effective()
            loss = exact_loss(self._started.model, self._started.order.batch(place), weights)
            found = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
            norm = torch.stack([one.norm() for one in found]).norm()
            share = min(1.0, 1.0 / (float(norm) + 1e-6))
            leaves = [*self.base.values(), *self._factors]
            for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                leaf.grad = share * gradient
            for optimizer in (self._optimizer, self._of_factors):
                optimizer.param_groups[0]["lr"] = rate
                optimizer.step()


def assert_same(started: Started, oracle: Oracle, **tolerances: Any) -> None:
    """The weights of an arm are the effective ones of its oracle."""
    expected = oracle.effective()
    for name, value in started.weights().items():
        torch.testing.assert_close(
            value, expected[name].detach(), msg=lambda text, name=name: f"{name}: {text}",
            **{"rtol": 0, "atol": 1e-9, **tolerances},
        )  # fmt: skip
