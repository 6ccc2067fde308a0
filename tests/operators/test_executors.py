"""Executors of kernels against the operators one by one, and which of them is made."""

import pytest
import torch
from helpers import (
    CHANGE_BOUND,
    SMOOTH_EPS,
    change_error,
    linear_site,
    tiny_qwen,
    tokens,
)
from simulated_ranks import random_operator, with_gradients

from apex_composer import Expander, find_sites
from apex_composer.operators.executors import KernelExecutor, whole_executors
from apex_composer.operators.operator import ExpansionOperator
from apex_composer.ops import reference
from apex_composer.triton_kernels.availability import interpreted

DEVICE = torch.device("cpu" if interpreted() else "cuda")
# float32's rounding is 6e-8, of sums of 6 numbers at most.
NEAR = {"rtol": 1e-5, "atol": 1e-6}


def some_operators() -> list[ExpansionOperator]:
    """Rows with a bias and columns, two of a kind, the same ones at every call."""
    torch.manual_seed(0)
    columns = {"rows": 5, "columns": 14, "axis": 1}
    transposed = {**columns, "bias": True, "transposed": True}
    kinds = [{"rows": 14, "columns": 5, "bias": True}, columns, transposed] * 2
    sites = [
        linear_site(**kind, name=str(place), dtype=torch.float32)
        for place, kind in enumerate(kinds)
    ]
    for site in sites:
        site.module.to(DEVICE)
    return with_gradients(random_operator(site, [1, 4, 6], [0, 3, 5]) for site in sites)


def tensors(operators) -> list[torch.Tensor]:
    """Weights and factors with their gradients, in one order."""
    leaves = [x for o in operators for x in (*o.site.parameters(), *o.factors)]
    return [t for x in leaves for t in (x.detach(), x.grad)]


@pytest.mark.numeric
def test_kernels_do_what_operators_do_one_by_one():
    operators, copies = some_operators(), some_operators()
    for own in (operators, copies):
        own[0].site.module.bias.grad = None  # frozen
        own[1].site.weight.grad = None  # not reached by the loss
    executors = whole_executors(operators, "triton")
    assert [type(executor) for executor in executors] == [KernelExecutor] * 3
    start = operators[0].site.weight.detach().clone()
    for step in ("fold", "map_gradient", "unfold", "fold"):
        for actor in (*executors, *copies):
            getattr(actor, step)()
            assert actor.folded == (step != "unfold")
        for found, expected in zip(tensors(operators), tensors(copies), strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                torch.testing.assert_close(found, expected, **NEAR)
    assert not torch.equal(operators[0].site.weight, start)
    assert operators[1].factors.left.grad is None
    norms = {name: x for executor in executors for name, x in executor.relative_norms().items()}
    assert norms == pytest.approx({o.site.name: float(o.relative_norm()) for o in copies}, rel=1e-5)


def test_memory_of_weights_and_biases_may_be_replaced():
    """As loading a checkpoint by `parameter.data = ...` does, in the middle of a stage."""
    found = []
    for moved in (False, True):
        own = some_operators()
        executors = whole_executors(own, "triton")
        if moved:
            for operator in own:
                for parameter in operator.site.parameters():
                    parameter.data = parameter.data.clone()
        for executor in executors:
            executor.fold()
            executor.map_gradient()
        found.append(tensors(own))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("call", ["unfold", "fold"])
def test_an_error_between_weight_and_bias_parts_them_and_the_next_fold_joins_them(
    implementation, call, monkeypatch
):
    """Without that, a batch tried again would run on base weights, or on T W[P] twice."""
    operator = some_operators()[0]
    (executor,) = whole_executors([operator], implementation)
    executor.fold()
    expected = [p.detach().clone() for p in operator.site.parameters()]
    if call == "fold":
        executor.unfold()
    kernels = implementation == "triton"
    owner, name = (executor._batches[1], "fold") if kernels else (reference, "add")
    real, calls = getattr(owner, name), []

    def fail(*arguments, **options):
        calls.append(arguments)
        if len(calls) == (1 if kernels else 2):
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(owner, name, fail)
        getattr(executor, call)()
    assert not executor.folded
    executor.restore()
    assert executor.folded
    for found, given in zip(operator.site.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), given, **NEAR)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_operators_follow_parameters_that_are_replaced(implementation):
    """By load_state_dict(assign=True), with a new optimizer, as torch has it."""
    model, expander = trained(implementation, steps=1)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.zero_grad()
    model.load_state_dict(weights, assign=True)
    expander.attachment.remove()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=SMOOTH_EPS)
    expander.attach(optimizer)
    before = [factor.clone() for operator in expander.operators for factor in operator.factors]
    batch = tokens(samples=3, length=12, seed=1).to(DEVICE)
    model(batch, labels=batch).loss.backward()
    optimizer.step()
    after = [factor for operator in expander.operators for factor in operator.factors]
    assert not any(map(torch.equal, before, after))


def trained(implementation: str, steps: int = 2):
    """A model after some steps of a stage, and its expander."""
    model = tiny_qwen().to(DEVICE)
    sites = find_sites(model)
    expander = Expander(sites, threshold=0.25, kv_heads="expand", implementation=implementation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=SMOOTH_EPS, weight_decay=0.1)
    with expander.assessing():
        model(tokens(samples=3, length=12, seed=99).to(DEVICE))
    expander.begin_stage()
    expander.attach(optimizer)
    for seed in range(steps):
        batch = tokens(samples=3, length=12, seed=seed).to(DEVICE)
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    return model, expander


@pytest.mark.numeric
def test_some_shapes_by_torch_and_others_by_kernels_train_as_torch_does(monkeypatch):
    start, fresh = trained("torch", steps=0)
    expected, by_torch = trained("torch")
    # At a quarter of 24 channels n = 6 has blocks of 2 x 3, a head of 8 rows has 2 x 4.
    monkeypatch.setattr(
        "apex_composer.operators.executors.resolve_monarch",
        lambda implementation, device, dtype, p, q: "torch" if (p, q) == (2, 3) else "triton",
    )
    model, expander = trained("triton")
    kinds = [type(executor).__name__ for executor in expander.executors]
    assert kinds.count("ExpansionOperator") == 3 * 2 and "KernelExecutor" in kinds
    before, after = dict(start.named_parameters()), dict(expected.named_parameters())
    for name, weight in model.named_parameters():
        assert change_error(weight, after[name], before[name]) < CHANGE_BOUND, name
    for one, other, first in zip(
        expander.operators, by_torch.operators, fresh.operators, strict=True
    ):
        for own in zip(one.factors, other.factors, first.factors, strict=True):
            assert change_error(*own) < CHANGE_BOUND, one.site.name
