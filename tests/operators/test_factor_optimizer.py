"""The factors' AdamW follows the user's optimizer and survives a checkpoint."""

import io

import pytest
import torch
from helpers import linear_site, selection
from torch.optim import SGD, AdamW

from apex_composer.operators.factor_optimizer import OperatorOptimizer
from apex_composer.operators.operator import ExpansionOperator

pytestmark = pytest.mark.numeric

SELECTED = selection([0, 2, 5, 6], [1, 3, 4, 7])


def make_operators(count: int = 2) -> list[ExpansionOperator]:
    torch.manual_seed(0)
    return [
        ExpansionOperator(linear_site(9, 3, name=f"layer.{place}.weight"), SELECTED, seed=1)
        for place in range(count)
    ]


def main_for(operators, kind=AdamW, **settings):
    return kind([operator.site.weight for operator in operators], **settings)


def factors_of(operators) -> list[torch.Tensor]:
    return [factor for operator in operators for factor in operator.factors]


def set_gradients(factors, step: int) -> None:
    """Gradients that depend on the step and the place only."""
    for place, factor in enumerate(factors):
        generator = torch.Generator().manual_seed(100 * step + place)
        factor.grad = torch.randn(factor.shape, generator=generator, dtype=factor.dtype)


def assert_equal(found, expected) -> None:
    for first, second in zip(found, expected, strict=True):
        assert torch.equal(first, second)


def assert_close(found, expected) -> None:
    """For torch's other AdamW: one kernel per tensor here, ten there, each rounding otherwise.

    In float64 a step is about twenty roundings of 1e-16, of numbers of the size of the factors.
    """
    for first, second in zip(found, expected, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-13, atol=1e-13)


def test_steps_are_those_of_adamw_without_weight_decay():
    operators = make_operators()
    twins = [factor.clone() for factor in factors_of(operators)]
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3}
    optimizer = OperatorOptimizer(
        operators, main_for(operators, **settings, weight_decay=0.5), lr_scale=0.3
    )
    settings["lr"] = 0.1 * 0.3
    expected = AdamW(twins, **settings, weight_decay=0.0)
    for step in range(3):
        for factors in (factors_of(operators), twins):
            set_gradients(factors, step)
        optimizer.step()
        expected.step()
    assert_close(factors_of(operators), twins)


def test_the_learning_rate_is_followed_at_every_step():
    operators = make_operators(1)
    twins = [factor.clone() for factor in operators[0].factors]
    main = main_for(operators, lr=0.1)
    optimizer = OperatorOptimizer(operators, main)
    expected = AdamW(twins, lr=0.1, weight_decay=0.0)
    for step, lr in enumerate((0.1, 0.02, 0.0)):
        main.param_groups[0]["lr"] = expected.param_groups[0]["lr"] = lr
        for factors in (operators[0].factors, twins):
            set_gradients(factors, step)
        optimizer.step()
        expected.step()
    assert_close(operators[0].factors, twins)


def test_every_operator_follows_the_param_group_of_its_weight():
    operators = make_operators(3)
    weights = [operator.site.weight for operator in operators]
    main = AdamW(
        [
            {"params": [weights[1]], "lr": 0.3, "betas": (0.5, 0.6), "eps": 1e-2},
            {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 9.0},
            {"params": [weights[0], weights[2]], "lr": 0.1},
        ]
    )
    optimizer = OperatorOptimizer(operators, main)
    twins = [[factor.clone() for factor in operator.factors] for operator in operators]
    options = [{"lr": 0.1}, {"lr": 0.3, "betas": (0.5, 0.6), "eps": 1e-2}, {"lr": 0.1}]
    separate = [AdamW(t, **o, weight_decay=0.0) for t, o in zip(twins, options, strict=True)]
    for step in range(2):
        for factors in ([f for o in operators for f in o.factors], [f for t in twins for f in t]):
            set_gradients(factors, step)
        optimizer.step()
        for expected in separate:
            expected.step()
    for operator, twin in zip(operators, twins, strict=True):
        assert_close(operator.factors, twin)


def test_an_optimizer_without_betas_gets_the_usual_ones():
    operators = make_operators(1)
    twins = [factor.clone() for factor in operators[0].factors]
    optimizer = OperatorOptimizer(operators, main_for(operators, SGD, lr=0.1))
    expected = AdamW(twins, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step in range(2):
        for factors in (operators[0].factors, twins):
            set_gradients(factors, step)
        optimizer.step()
        expected.step()
    assert_close(operators[0].factors, twins)


def test_gradients_are_used_once():
    operators = make_operators(1)
    optimizer = OperatorOptimizer(operators, main_for(operators, lr=0.1))
    set_gradients(operators[0].factors, 0)
    optimizer.step()
    assert all(factor.grad is None for factor in operators[0].factors)
    before = [factor.clone() for factor in operators[0].factors]
    optimizer.step()  # momentum alone must not move what got no gradient
    assert_equal(operators[0].factors, before)


def test_the_main_optimizer_is_left_alone():
    operators = make_operators()
    main = main_for(operators, lr=0.1)
    before = [dict(group) for group in main.param_groups]
    optimizer = OperatorOptimizer(operators, main)
    set_gradients(factors_of(operators), 0)
    optimizer.step()
    assert main.state_dict()["state"] == {}
    assert [dict(group) for group in main.param_groups] == before


def test_a_saved_optimizer_goes_on_bit_for_bit():
    def steps(operators, optimizer, numbers):
        for step in numbers:
            set_gradients(factors_of(operators), step)
            optimizer.step()

    straight = make_operators(3)
    steps(straight, OperatorOptimizer(straight, main_for(straight, lr=0.1)), range(5))

    killed = make_operators(3)
    optimizer = OperatorOptimizer(killed, main_for(killed, lr=0.1))
    steps(killed, optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    moments = torch.load(file, weights_only=True)  # as Composer after 0.32.1 loads

    resumed = make_operators(3)
    for factor, saved in zip(factors_of(resumed), factors_of(killed), strict=True):
        factor.copy_(saved)
    # Another order of the main optimizer's param groups: moments belong to names, not places.
    main = AdamW([{"params": [o.site.weight]} for o in reversed(resumed)], lr=0.1)
    optimizer = OperatorOptimizer(resumed, main)
    optimizer.load_state_dict(moments)
    steps(resumed, optimizer, range(3, 5))
    assert_equal(factors_of(resumed), factors_of(straight))


def test_a_state_is_a_copy_by_factor():
    operators = make_operators()
    optimizer = OperatorOptimizer(operators, main_for(operators, lr=0.1))
    names = [f"layer.{place}.weight.{side}" for place in (0, 1) for side in ("left", "right")]
    optimizer.load_state_dict(optimizer.state_dict())  # before the first step
    assert optimizer.state_dict() == {name: {} for name in names}
    set_gradients(factors_of(operators), 0)
    optimizer.step()
    saved = optimizer.state_dict()
    assert list(saved) == names
    assert set(saved[names[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    copies = {name: {k: v.clone() for k, v in state.items()} for name, state in saved.items()}
    set_gradients(factors_of(operators), 1)
    optimizer.step()
    for name in names:
        assert_equal(saved[name].values(), copies[name].values())


def test_a_loaded_state_is_not_changed_by_training():
    saved = make_operators()
    optimizer = OperatorOptimizer(saved, main_for(saved, lr=0.1))
    set_gradients(factors_of(saved), 0)
    optimizer.step()
    moments = optimizer.state_dict()
    copies = {name: {k: v.clone() for k, v in state.items()} for name, state in moments.items()}
    resumed = make_operators()
    optimizer = OperatorOptimizer(resumed, main_for(resumed, lr=0.1))
    optimizer.load_state_dict(moments)
    set_gradients(factors_of(resumed), 1)
    optimizer.step()
    for name, state in moments.items():
        assert_equal(state.values(), copies[name].values())
