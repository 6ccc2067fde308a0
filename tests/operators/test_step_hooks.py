"""`optimizer.step()` becomes an APEX step, however it is called and whatever goes wrong inside."""

import copy

import pytest
import torch
from helpers import cross_entropy, tiny_llama, tokens
from torch.optim import SGD, AdamW, Optimizer

from apex_composer import Expander, find_sites

pytestmark = pytest.mark.numeric

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


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def assert_close(first: dict, second: dict, tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.allclose(first[name], second[name], rtol=tolerance, atol=tolerance), name


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


def test_a_rearmed_attachment_works_again():
    run, expected = Run(), Run()
    run.attachment.armed = False
    run.attachment.armed = True
    run.step()
    expected.step()
    assert_same(run.everything(), expected.everything())


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


def test_a_stage_without_operators_is_an_ordinary_step():
    run = Run()
    run.expander.fuse()
    twin = copy.deepcopy(run.model)
    optimizer = AdamW(twin.parameters(), lr=LR)
    run.step()
    cross_entropy(twin(tokens(2)).logits, tokens(2)).backward()
    optimizer.step()
    for own, other in zip(run.model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(own, other)


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


def test_an_optimizer_without_the_weights_is_refused():
    run = Run(attached=False)
    foreign = SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    with pytest.raises(ValueError, match="is not trained by the optimizer"):
        run.expander.attach(foreign)


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


@pytest.mark.parametrize("how", ["clamped", "loaded", "replaced"])
def test_a_step_of_nothing_leaves_changed_weights(how):
    run = Run()
    for step in range(2):
        run.step(step)
    change_weights(run, how)
    before = [p.detach().clone() for p in run.model.parameters()]
    run.optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
    run.step(2)
    for parameter, values in zip(run.model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), values, rtol=0, atol=1e-12)


def test_all_positional_arguments_of_a_step_are_handed_on():
    run = Run(Failing)
    run.optimizer.step(run.closure(), 3.0)
    assert run.optimizer.extra == 3.0
