"""A tiny Llama in the middle of a stage, and an optimizer whose steps can be made to fail."""

import torch
from helpers import cross_entropy, tiny_llama, tokens
from torch.optim import AdamW, Optimizer

from apex_composer import Expander, find_sites

LR = 1e-2


class Run:
    """A tiny Llama in a stage whose operators already do something."""

    def __init__(self, kind=AdamW, attached: bool = True, **options):
        self.model = tiny_llama(dtype=torch.float64)
        # A scale that is given is not warned about with SGD.
        self.expander = Expander(
            find_sites(self.model), threshold=0.25, method="random", operator_lr_scale=1.0
        )
        self.optimizer = kind(self.model.parameters(), lr=LR, **options)
        self.expander.begin_stage()
        for operator in self.expander.operators:
            operator.unfold()
            generator = torch.Generator().manual_seed(1)
            operator.factors.left.normal_(std=0.1, generator=generator)
            operator.fold()
        self.attachment = self.expander.attach(self.optimizer) if attached else None

    def closure(self, step: int = 0):
        def compute():
            self.optimizer.zero_grad()
            loss = cross_entropy(self.model(tokens(2, seed=step)).logits, tokens(2, seed=step))
            loss.backward()
            return loss

        return compute

    def step(self, step: int = 0) -> torch.Tensor:
        loss = self.closure(step)()
        self.optimizer.step()
        return loss

    def everything(self) -> dict[str, torch.Tensor]:
        """Copies of all weights, factors and operators' moments."""
        found = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        state = self.expander.state_dict()
        for site, pair in state["factors"].items():
            found |= {f"{site}.left": pair[0], f"{site}.right": pair[1]}
        for name, moments in state["moments"].items():
            found |= {f"{name}.{key}": value for key, value in moments.items()}
        return found

    @property
    def folded(self) -> list[bool]:
        return [operator.folded for operator in self.expander.operators]


class Failing(Optimizer):
    """Gradient descent that dies in its step when told to, behind the closure."""

    broken, inside = False, None

    def __init__(self, parameters, lr: float):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None, extra=None):
        self.extra, loss = extra, None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.inside is not None:
            self.inside()
        if self.broken:
            raise RuntimeError("simulated")
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(parameter.grad, alpha=-group["lr"])
        return loss


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def assert_close(first: dict, second: dict, tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.allclose(first[name], second[name], rtol=tolerance, atol=tolerance), name
