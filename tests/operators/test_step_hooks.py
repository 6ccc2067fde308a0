"""`optimizer.step()` becomes an APEX step, however it is called."""

import pytest
import torch
from helpers import cross_entropy, tokens
from running_stage import LR, Failing, Run, assert_close, assert_same
from torch.optim import SGD, AdamW

from apex_composer import Expander
from apex_composer.operators.factor_optimizer import OperatorOptimizer

pytestmark = pytest.mark.numeric


def test_a_step_trains_weights_and_operators():
    run = Run()
    before = run.everything()
    run.step()
    after = run.everything()
    for name, value in before.items():
        assert not torch.equal(after[name], value), name
    assert all(run.folded)


@pytest.mark.parametrize("how", ["keyword", "positional"])
def test_a_closure_and_a_plain_step_are_the_same(how):
    plain, closed = Run(), Run()
    for step in range(3):
        expected = plain.step(step)
        closure = closed.closure(step)
        if how == "keyword":
            loss = closed.optimizer.step(closure=closure)
        else:
            loss = closed.optimizer.step(closure)
        assert torch.equal(loss, expected)
    assert_same(plain.everything(), closed.everything())


def test_the_optimizer_acts_on_the_base_weights():
    """Weight decay shrinks W[N], not W[N] + T W[P]: to nothing with lr * decay = 1."""
    run = Run(SGD, weight_decay=1 / LR)
    operator = run.expander.operators[0]
    weight, rows = operator.site.weight, operator.disadvantageous
    with torch.no_grad():
        run.optimizer.zero_grad()
        for parameter in run.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run.optimizer.step()
    # W[P] is decayed to zero as well, and with it T W[P]. Had W_eff been decayed, W[N] would be
    # -T W[P] with the W[P] from before.
    assert weight[rows].abs().max() < 1e-12


def test_a_clipped_gradient_is_the_effective_one():
    """Clipping inside the closure acts before the mapping, like clipping between the two calls."""
    plain, closed = Run(), Run()

    def clipped(run):
        loss = run.closure()()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.01)
        return loss

    clipped(plain)
    plain.optimizer.step()
    closed.optimizer.step(lambda: clipped(closed))
    assert_same(plain.everything(), closed.everything())


@pytest.mark.parametrize("closure", [False, True])
def test_a_disarmed_attachment_lets_phantom_steps_pass(closure):
    """torch's checkpoint code steps with lr 0 and zero gradients to make the optimizer's state."""
    run = Run()
    before, calls = run.everything(), []
    run.attachment.armed = False
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step(lambda: calls.append(1)) if closure else run.optimizer.step()
    assert calls == [1] * closure
    assert len(run.optimizer.state) > 0
    assert_same(run.everything(), before)
    assert all(run.folded)


def test_a_removed_attachment_does_nothing():
    run, plain = Run(), Run(attached=False)
    run.attachment.remove()
    before = [factor.clone() for o in run.expander.operators for factor in o.factors]
    for each in (run, plain):
        each.step()
    after = [factor for o in run.expander.operators for factor in o.factors]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for own, other in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(own, other)


def test_a_closure_that_fails_leaves_the_weights_folded():
    run = Run()
    before = run.everything()

    def fail():
        raise RuntimeError("simulated")

    with pytest.raises(RuntimeError, match="simulated"):
        run.optimizer.step(fail)
    assert all(run.folded)
    assert_same(run.everything(), before)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_grad_scaler_skips_changes_nothing(fused):
    """A fused optimizer's step() is called even so; it looks at `found_inf` itself."""
    run = Run(fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loss = run.closure()()
    run.optimizer.zero_grad()
    before = run.everything()
    scaler.scale(loss.detach().requires_grad_())  # the scale is made on first use
    for parameter in run.model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    scaler.step(run.optimizer)
    scaler.update()
    assert all(run.folded)
    assert_same(run.everything(), before)
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize(
    ("fused", "unscaled"),
    [
        (False, False),
        (False, True),
        (True, True),
        (True, False),
    ],
)
def test_a_grad_scaler_does_not_change_the_result(fused, unscaled):
    """A fused optimizer gets scaled gradients and divides them itself."""
    run, expected = Run(fused=fused), Run(fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for step in range(2):
        run.optimizer.zero_grad()
        ids = tokens(2, seed=step)
        scaler.scale(cross_entropy(run.model(ids).logits, ids)).backward()
        if unscaled:
            scaler.unscale_(run.optimizer)
        scaler.step(run.optimizer)
        scaler.update(2.0**10)
        expected.step(step)
    assert_close(run.everything(), expected.everything(), 1e-9)


class Derived(AdamW):
    """Steps its base class, whose step() torch has given hooks of its own."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("closure", [False, True])
def test_an_optimizer_that_steps_its_base_class_is_refused(closure):
    """Its hooks run twice a step, once in each class."""
    run = Run(Derived)
    Run(AdamW)  # torch puts its hooks into a class when the first object of it is made
    with pytest.raises(RuntimeError, match="base weights"):
        run.optimizer.step(run.closure()) if closure else run.step()


@pytest.mark.parametrize("own", [True, False], ids=["same expander", "another expander"])
def test_a_second_attachment_is_refused(own):
    """Two would map every gradient twice and subtract T W[P] twice."""
    run = Run()
    expander = run.expander if own else Expander(run.expander.sites, operator_lr_scale=1.0)
    with pytest.raises(RuntimeError, match=r"attached.*remove\(\)"):
        expander.attach(run.optimizer)
    run.attachment.remove()
    expander.attach(run.optimizer)


def test_attaching_before_the_stage_begins_is_the_same():
    late, early = Run(), Run(attached=False)
    early.expander.attach(early.optimizer)
    for run in (late, early):
        run.expander.begin_stage()
        run.step()
    assert_same(late.everything(), early.everything())


def test_memory_that_runs_out_behind_the_main_step_is_no_reason_to_repeat_the_batch(monkeypatch):
    """The weights have moved: Composer's `auto` would train the batch a second time."""
    run, given = Run(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    def fail(*_: object) -> None:
        raise given

    run.step()
    monkeypatch.setattr(OperatorOptimizer, "step", fail)
    with pytest.raises(RuntimeError, match="the batch would be trained twice") as found:
        run.step()
    assert "out of memory" not in str(found.value) and found.value.__cause__ is given
    given = RuntimeError("no luck")
    run.optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="no luck"):
        run.step()


def test_all_positional_arguments_of_a_step_are_handed_on():
    run = Run(Failing)
    run.optimizer.step(run.closure(), 3.0)
    assert run.optimizer.extra == 3.0
