import pytest
import torch
from reproduce.arms import Arm
from reproduce.model import train
from reproduce.operator_variations import decay_factors, dense_factors, gates_and_ups
from tiny_arms import start, train_stage

from apex_composer.ops.monarch import MonarchFactors, init_factors, to_dense
from apex_composer.ops.reference import fold, map_gradient

SIZE, COLUMNS = 6, 10


def weight_and_units():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(20, COLUMNS, generator=generator, dtype=torch.float64)
    return weight, torch.arange(SIZE), torch.arange(SIZE, 2 * SIZE), generator


@pytest.mark.parametrize("axis", [0, 1])
def test_a_dense_operator_of_the_same_t_gives_the_same_weight(axis):
    weight, strong, weak, generator = weight_and_units()
    weight = weight if axis == 0 else weight.t().contiguous()
    _, right = init_factors(SIZE, generator=generator, dtype=torch.float64)
    left = torch.randn(3, 2, 2, generator=generator, dtype=torch.float64)
    monarch = MonarchFactors(left, right)
    dense = MonarchFactors(to_dense(monarch).unsqueeze(0), torch.ones(SIZE, 1, 1).double())
    by_monarch, by_dense = weight.clone(), weight.clone()
    fold(by_monarch, monarch, strong, weak, axis=axis)
    fold(by_dense, dense, strong, weak, axis=axis)
    assert torch.equal(to_dense(dense), to_dense(monarch))
    torch.testing.assert_close(by_dense, by_monarch, rtol=0, atol=1e-14)
    assert not torch.equal(by_dense, weight)


def test_a_dense_operator_s_gradients_are_those_of_autograd():
    weight, strong, weak, generator = weight_and_units()
    gradient = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    operator = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    factors = MonarchFactors(operator.unsqueeze(0), torch.ones(SIZE, 1, 1).double())
    base, dense = weight.clone().requires_grad_(), operator.clone().requires_grad_()
    effective = base.index_add(0, weak, dense @ base[strong])
    effective.backward(gradient)
    mapped = gradient.clone()
    found = map_gradient(weight, mapped, factors, strong, weak, axis=0)
    torch.testing.assert_close(found.left[0], dense.grad, rtol=0, atol=1e-13)
    torch.testing.assert_close(mapped, base.grad, rtol=0, atol=1e-13)


def test_dense_operators_start_at_zero_and_keep_their_diagonal_of_ones():
    started = start(Arm("dense", apex={}, variation={"dense": True}))
    before = started.weights()
    started.varied.begin(0)
    assert all(torch.equal(value, before[name]) for name, value in started.weights().items())
    assert len(started.varied.expander.operators) == len(started.varied.expander.sites)
    started = start(Arm("dense", apex={}, variation={"dense": True}))
    train_stage(started, 0, 3)
    for operator in started.varied.expander.operators:
        left, right = operator.factors
        size = len(operator.advantageous)
        assert left.shape == (1, size, size) and left.count_nonzero() == left.numel()
        assert torch.equal(right, dense_factors(size).right)


def test_the_scale_of_r_multiplies_what_is_drawn_in_every_stage():
    plain, scaled = (
        start(Arm("scaled", apex={}, variation=own)) for own in ({}, {"right_scale": 3.0})
    )
    for stage in range(2):
        for started in (plain, scaled):
            started.varied.begin(stage)
        pairs = zip(plain.varied.expander.operators, scaled.varied.expander.operators, strict=True)
        for own, other in pairs:
            assert torch.equal(own.factors.right * 3.0, other.factors.right)
            assert not other.factors.left.any()
        for started in (plain, scaled):
            continue_stage(started, 1)


def test_tied_operators_stay_one_and_take_the_sum_of_both_gradients():
    started = start(Arm("tied", apex={}, variation={"tied": True}))
    untied = start(Arm("plain", apex={}))
    seen = {}

    def keep(name):
        expander = (started if name == "tied" else untied).varied.expander

        def hook(*_):
            seen.setdefault(
                name, [[o.factors.left.grad.clone() for o in p] for p in gates_and_ups(expander)]
            )

        return hook

    for name, one in (("tied", started), ("plain", untied)):
        facts = one.varied.begin(0)
        assert facts["norms"]
        one.optimizer.register_step_pre_hook(keep(name))
    # One R for both from the start, so that the gradients of the first step are comparable.
    for gate, up in gates_and_ups(untied.varied.expander):
        up.factors.right.copy_(gate.factors.right)
    for one in (started, untied):
        continue_stage(one, 4)
    for (tied, other), (gate, up) in zip(seen["tied"], seen["plain"], strict=True):
        assert torch.equal(tied, gate + up) and torch.equal(other, tied) and tied.any()
    for gate, up in gates_and_ups(started.varied.expander):
        for own, other in zip(gate.factors, up.factors, strict=True):
            assert torch.equal(own, other)
    assert any(
        not torch.equal(gate.factors.left, up.factors.left)
        for gate, up in gates_and_ups(untied.varied.expander)
    )


def continue_stage(started, batches):
    train(
        started.model, started.optimizer, started.order, range(batches), lambda place: 2e-3,
        forward=started.varied.assessing, clip=started.varied.clip,
    )  # fmt: skip


def test_tied_needs_a_gate():
    started = start(Arm("tied", apex={}, variation={"tied": True, "sites": "attention"}))
    with pytest.raises(ValueError, match="tied: no layer has a gate"):
        started.varied.begin(0)


def test_the_decay_of_operators_is_that_of_adamw():
    decayed = start(Arm("decay", apex={}, variation={"decay": 0.1}))
    plain = start(Arm("plain", apex={}))
    for one in (decayed, plain):
        one.varied.begin(0)
    # The same by the operators' own AdamW, which has no public setting for it.
    for group in plain.varied.expander.running._optimizer._optimizer.param_groups:
        group["weight_decay"] = 0.1
    for one in (decayed, plain):
        continue_stage(one, 4)
    pairs = zip(decayed.varied.expander.operators, plain.varied.expander.operators, strict=True)
    for own, other in pairs:
        for factor, expected in zip(own.factors, other.factors, strict=True):
            torch.testing.assert_close(factor, expected, rtol=1e-5, atol=1e-7)


def test_decay_passes_over_what_is_not_trained():
    started = start(Arm("dense", apex={}, variation={"dense": True}))
    started.varied.begin(0)
    operator = started.varied.expander.operators[0]
    operator.factors.left.fill_(1.0)
    operator.factors.left.grad = torch.zeros_like(operator.factors.left)
    decay_factors(started.varied.expander, 0.25)
    assert torch.all(operator.factors.left == 0.75) and torch.all(operator.factors.right == 1)
