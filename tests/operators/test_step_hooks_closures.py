"""Optimizers that call their closure more than once, on whole weights and on shards of them."""

import pytest
import torch
from helpers import linear_site
from oracle import dense_operator
from simulated_ranks import SimulatedRanks, cut, run_ranks, whole
from torch.optim import Optimizer

from apex_composer import Expander
from apex_composer.sharding.sharded_executor import ShardedExecutor

LR = 1e-2


class Trials(Optimizer):
    """Asks for the gradient at several trial points, as SAM (two) and LBFGS (many) do.

    Every trial moves along the last gradient; the step goes from the first point.
    """

    trials = 1

    def __init__(self, parameters, lr: float):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure):
        own = [p for group in self.param_groups for p in group["params"]]
        loss, start = torch.enable_grad()(closure)(), [p.clone() for p in own]
        for _ in range(self.trials):
            for p in own:
                p.add_(p.grad, alpha=self.param_groups[0]["lr"])
            torch.enable_grad()(closure)()
        for p, first in zip(own, start, strict=True):
            p.copy_(first).add_(p.grad, alpha=-self.param_groups[0]["lr"])
        return loss


def quartic(values: torch.Tensor, start: int = 0) -> torch.Tensor:
    """A loss that is a sum over entries, so that a rank can differentiate its own."""
    return (torch.arange(start + 1.0, start + len(values) + 1) * values**4).sum() / 10


class Small:
    """Two Linears in a stage whose operators already do something; their loss is `quartic`."""

    def __init__(self, trials: int):
        torch.manual_seed(0)
        self.sites = [
            linear_site(9, 7, bias=True, name="rows"),
            linear_site(7, 9, axis=1, name="columns"),
        ]
        self.shards = [[None] * len(site.parameters()) for site in self.sites]
        self.trials = trials
        self.expander = Expander(self.sites, threshold=0.25, method="random", operator_lr_scale=1.0)
        self.expander.begin_stage()
        for operator in self.expander.operators:
            operator.unfold()
            operator.factors.left.normal_(generator=torch.Generator().manual_seed(1))
            operator.fold()

    def on(self, ranks: SimulatedRanks) -> "Small":
        """The same on one rank, which holds a part of every weight."""
        edges = [[[0, 25, 40, 63], [0, 4, 4, 9]], [[0, 10, 31, 63]]]
        for i, site in enumerate(self.sites):
            self.shards[i] = [
                cut(parameter, edges[i][place], ranks.rank)
                for place, parameter in enumerate(site.parameters())
            ]
            for name, shard in zip(("weight", "bias"), self.shards[i], strict=False):
                setattr(site.module, name, shard.parameter)
        operators = self.expander.operators
        self.expander.executors[:] = [ShardedExecutor(operators, self.shards, ranks)]
        return self

    def train(self, steps: int = 3) -> "Small":
        """Some steps of an optimizer that calls its closure once more for every trial."""
        optimizer = Trials([p for site in self.sites for p in site.parameters()], lr=LR)
        optimizer.trials = self.trials
        self.expander.attach(optimizer)
        for _ in range(steps):
            optimizer.step(lambda: self.closure(optimizer))
        return self

    def closure(self, optimizer) -> float:
        optimizer.zero_grad()
        parts = [
            quartic(parameter.flatten(), shard.start if shard else 0)
            for site, shards in zip(self.sites, self.shards, strict=True)
            for parameter, shard in zip(site.parameters(), shards, strict=True)
        ]
        sum(parts).backward()
        return 1.0

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().flatten() for site in self.sites for p in site.parameters()]

    def factors(self) -> list[torch.Tensor]:
        return [factor for o in self.expander.operators for factor in o.factors]


@pytest.mark.parametrize("trials", [1, 3], ids=["SAM", "LBFGS"])
def test_shards_train_as_whole_weights_do(trials):
    """A trial changes W[P], so T W[P] is computed anew, by all ranks together."""
    expected, ranked = Small(trials).train(), [Small(trials) for _ in range(3)]
    parts = run_ranks(3, lambda ranks: ranked[ranks.rank].on(ranks).train())
    for place, weight in enumerate(expected.weights()):
        shards = [[s for pair in run.shards for s in pair][place] for run in parts]
        torch.testing.assert_close(whole(shards), weight, rtol=1e-11, atol=1e-11)
    for run in parts:
        for own, factor in zip(run.factors(), expected.factors(), strict=True):
            torch.testing.assert_close(own, factor, rtol=1e-11, atol=1e-11)


def by_autograd(run: Small, steps: int = 3) -> list[torch.Tensor]:
    """The weights that `run.train()` should end with: W and T as leaves of autograd."""
    base, leaves, effective = [], [], []
    for operator in run.expander.operators:
        operator.unfold()
        factors = [factor.clone().requires_grad_() for factor in operator.factors]
        leaves += factors
        for parameter in operator.site.parameters():
            base.append(parameter.detach().clone().requires_grad_())
            effective.append((base[-1], operator, factors))

    def weights() -> list[torch.Tensor]:
        found = []
        for weight, operator, factors in effective:
            axis, dense = operator.site.axis, dense_operator(*factors)
            rows = weight if axis == 0 else weight.t()
            rows = rows.index_add(0, operator.disadvantageous, dense @ rows[operator.advantageous])
            found.append(rows if axis == 0 else rows.t())
        return found

    moments = torch.optim.AdamW(leaves, LR, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(steps):
        start = [weight.detach().clone() for weight in base]
        for trial in range(run.trials + 1):
            gradients = torch.autograd.grad(
                sum(quartic(w.flatten()) for w in weights()), base + leaves
            )
            with torch.no_grad():
                for weight, first, gradient in zip(base, start, gradients, strict=False):
                    last = trial == run.trials
                    weight.copy_(first - LR * gradient if last else weight + LR * gradient)
        for leaf, gradient in zip(leaves, gradients[len(base) :], strict=True):
            leaf.grad = gradient
        moments.step()
    return [weight.detach().flatten() for weight in weights()]


@pytest.mark.parametrize("trials", [1, 3], ids=["SAM", "LBFGS"])
def test_every_trial_is_differentiated_where_it_is(trials):
    for found, expected in zip(
        Small(trials).train().weights(), by_autograd(Small(trials)), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


class Climbing(Trials):
    """SAM as it is mostly written: moves along a gradient that it is handed, then asks."""

    @torch.no_grad()
    def step(self, closure):
        for p in self.param_groups[0]["params"]:
            p.add_(p, alpha=0.1)
        return torch.enable_grad()(closure)()


def test_weights_that_move_before_the_closure_are_refused():
    """They hold W + T W[P] then, and a copy of that would become the base weight."""
    run = Small(trials=0)
    optimizer = Climbing([p for site in run.sites for p in site.parameters()], lr=LR)
    run.expander.attach(optimizer)
    with pytest.raises(RuntimeError, match="before it called its closure.*`base_optimizer`"):
        optimizer.step(lambda: run.closure(optimizer))


def test_shards_changed_between_two_steps_are_refused():
    """W[P] would have to be gathered anew, which one rank alone cannot decide; T W[P] is stale."""
    ranked = [Small(trials=0) for _ in range(3)]

    def run(ranks):
        small = ranked[ranks.rank].on(ranks)
        parameters = [p for site in small.sites for p in site.parameters()]
        optimizer = Trials(parameters, lr=LR)
        optimizer.trials = 0
        small.expander.attach(optimizer)
        optimizer.step(lambda: small.closure(optimizer))
        with torch.no_grad():
            for parameter in parameters:
                parameter.clamp_(-0.01, 0.01)
        calls = len(ranks.calls)
        with pytest.raises(RuntimeError, match=r"since the last step.*expander\.state_dict"):
            optimizer.step(lambda: small.closure(optimizer))
        assert len(ranks.calls) == calls  # before any rank waits for another
        assert all(parameter.abs().le(0.01).all() for parameter in parameters)

    run_ranks(3, run)
