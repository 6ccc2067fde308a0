"""The operators of a stage around a step: what must not happen twice, half, or in between."""

import copy

import pytest
import torch
from helpers import cross_entropy, tiny_llama, tokens
from running_stage import Failing, Run, assert_close, assert_same
from torch.optim import SGD

from apex_composer import Expander

pytestmark = pytest.mark.numeric


def test_a_step_that_dies_leaves_base_weights_that_can_be_folded_again():
    run = Run(Failing)
    before = run.everything()
    run.optimizer.broken = True
    with pytest.raises(RuntimeError, match="simulated"):
        run.optimizer.step(run.closure())
    assert not any(run.folded)
    run.expander.ensure_folded()
    assert all(run.folded)
    assert_close(run.everything(), before, 1e-12)


def test_a_batch_tried_again_after_a_step_that_died():
    """Composer retries a batch whose step ran out of memory: with the effective weights."""
    run, expected = Run(Failing), Run(SGD)
    run.optimizer.broken = True
    with pytest.raises(RuntimeError, match="simulated"):
        run.optimizer.step(run.closure())
    run.optimizer.broken = False
    loss = run.optimizer.step(run.closure())
    torch.testing.assert_close(loss, expected.step(), rtol=1e-12, atol=0)
    assert_close(run.everything(), expected.everything(), 1e-9)


def test_a_plain_step_after_one_that_died_is_refused():
    """Its forward pass saw base weights; unfolding those again would corrupt them in silence."""
    run = Run(Failing)
    before = run.everything()
    run.optimizer.broken = True
    with pytest.raises(RuntimeError, match="simulated"):
        run.step()
    with pytest.raises(RuntimeError, match="base weights"):
        run.step()
    run.expander.ensure_folded()
    assert_close(run.everything(), before, 1e-9)


@pytest.mark.parametrize("closure", [False, True])
def test_gradients_are_mapped_once(closure):
    """T^T G[N] would be added to G[P] a second time."""
    run = Run()
    run.step()
    before = run.everything(), [p.grad.clone() for p in run.model.parameters()]
    with pytest.raises(RuntimeError, match="a second time.*zero_grad.*backward"):
        run.optimizer.step(lambda: None) if closure else run.optimizer.step()
    assert all(run.folded)
    assert_same(run.everything(), before[0])
    for parameter, gradient in zip(run.model.parameters(), before[1], strict=True):
        assert torch.equal(parameter.grad, gradient)
    run.step()


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_fresh_gradients_are_told_from_mapped_ones(to_none, microbatches):
    """Whatever memory they lie in and however often they have been written."""
    run = Run()
    for step in range(6):
        run.optimizer.zero_grad(set_to_none=to_none)
        for _ in range(1 + (step % 3) * (microbatches - 1)):
            cross_entropy(run.model(tokens(2, seed=step)).logits, tokens(2, seed=step)).backward()
        if step % 2:
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.01)
        run.optimizer.step()


def test_attaching_again_keeps_the_operators_moments():
    run, expected = Run(), Run()
    for step in range(4):
        if step == 2:
            run.attachment.remove()
            run.attachment = run.expander.attach(run.optimizer)
        run.step(step)
        expected.step(step)
    assert_same(run.everything(), expected.everything())


CALLS = {
    "state_dict": lambda run: run.expander.state_dict(),
    "fuse": lambda run: run.expander.fuse(),
    "begin_stage": lambda run: run.expander.begin_stage(),
    "load_state_dict": lambda run: run.expander.load_state_dict(run.saved),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("closure", [False, True])
def test_nothing_is_saved_or_ended_inside_a_step(call, closure):
    """The optimizer would step on the effective weights, and the operators not at all."""
    run = Run(Failing)
    run.saved = run.expander.state_dict()
    before = run.everything()
    if closure:
        run.optimizer.inside = lambda: CALLS[call](run)
    else:
        run.optimizer.register_step_pre_hook(lambda *_: CALLS[call](run) and None)
    with pytest.raises(RuntimeError, match="inside the optimizer's step"):
        run.optimizer.step(run.closure()) if closure else run.step()
    run.expander.ensure_folded()
    assert_close(run.everything(), before, 1e-12)


@pytest.mark.parametrize("handled", [True, False])
def test_a_state_is_saved_after_a_step_that_died(handled):
    """As trainers do on errors, also while the error is being handled."""
    run = Run(Failing)
    before = run.everything()
    run.optimizer.broken = True
    try:
        run.step()
    except RuntimeError:
        if handled:
            run.expander.state_dict()
            assert all(run.folded)
    run.expander.state_dict()
    assert all(run.folded)
    assert_close(run.everything(), before, 1e-12)


def test_a_state_is_saved_inside_a_closure():
    run, expected = Run(), Run()

    def closure():
        loss = run.closure()()
        run.expander.state_dict()
        return loss

    run.optimizer.step(closure)
    expected.step()
    assert_same(run.everything(), expected.everything())


def change_weights(run: Run, how: str) -> None:
    with torch.no_grad():
        if how == "clamped":
            for parameter in run.model.parameters():
                parameter.clamp_(-0.02, 0.02)
        elif how == "loaded":
            run.model.load_state_dict(tiny_llama(seed=5, dtype=torch.float64).state_dict())
        else:
            for parameter in run.model.parameters():
                parameter.data = torch.full_like(parameter, 0.01)


@pytest.mark.parametrize("how", ["clamped", "loaded", "replaced"])
def test_weights_changed_between_two_steps_are_the_effective_ones(how):
    """T goes on from them, as in a run that is resumed with them; W_eff does not jump."""
    run = Run()
    for step in range(2):
        run.step(step)
    change_weights(run, how)
    resumed = Expander(run.expander.sites, threshold=0.25, method="random", operator_lr_scale=1.0)
    resumed.load_state_dict(run.expander.state_dict())
    changed = [p.detach().clone() for p in run.model.parameters()]
    optimizer_state = copy.deepcopy(run.optimizer.state_dict())
    run.step(2)
    found = run.everything()
    run.attachment.remove()
    for parameter, values in zip(run.model.parameters(), changed, strict=True):
        parameter.data.copy_(values)
    run.optimizer.load_state_dict(optimizer_state)
    run.expander = resumed
    resumed.attach(run.optimizer)
    run.step(2)
    assert_same(found, run.everything())


def test_closing_folds_what_a_step_that_died_has_left():
    run = Run(Failing)
    before = run.everything()
    run.optimizer.broken = True
    with pytest.raises(RuntimeError, match="simulated"):
        run.step()
    run.expander.remove()
    assert all(run.folded)
    assert_close(run.everything(), before, 1e-12)


@pytest.mark.parametrize("how", ["clamped", "loaded", "replaced"])
def test_closing_adds_nothing_to_weights_that_have_changed_since(how):
    run = Run(Failing)
    run.optimizer.broken = True
    with pytest.raises(RuntimeError, match="simulated"):
        run.step()
    change_weights(run, how)
    before = [p.detach().clone() for p in run.model.parameters()]
    with pytest.warns(UserWarning, match="the weights have changed since"):
        run.expander.remove()
    for parameter, values in zip(run.model.parameters(), before, strict=True):
        assert torch.equal(parameter, values)
