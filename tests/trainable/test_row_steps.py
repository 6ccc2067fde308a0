"""Rows that are tied to an optimizer: what is refused, given up and given back."""

import copy

import pytest
import torch
from row_runs import (
    MODES,
    OPTIONS,
    loss_of,
    make_run,
    train,
)
from tiny_models import tiny_model
from torch.optim import AdamW

from apex_composer import Expander, find_sites
from apex_composer.trainable.row_optimizer import RowAdamW


def test_a_handle_that_is_removed_leaves_ordinary_training():
    run = make_run(tiny_model("llama"), **MODES["selected"])
    list(train(run, range(2)))
    run.expander.attachment.remove()
    twin = copy.deepcopy(run.model)
    optimizer = AdamW(twin.parameters(), **OPTIONS)
    for model, own in ((run.model, run.optimizer), (twin, optimizer)):
        loss_of(model, 2).backward()
        own.step()
    for name, weight in twin.state_dict().items():
        assert torch.equal(weight, run.model.state_dict()[name]), name
    run.expander.attach(run.optimizer)
    list(train(run, range(3, 4)))
    for name, weight in twin.state_dict().items():  # nothing of what was between is lost
        assert (weight - run.model.state_dict()[name]).abs().max() < 2 * OPTIONS["lr"], name


@pytest.mark.parametrize("mode", ["selected", "half"])
@pytest.mark.parametrize("part", ["q_proj.weight", "embed_tokens.weight"])
@pytest.mark.parametrize("frozen", [False, True])
def test_what_the_optimizer_does_not_train_is_refused(mode, part, frozen):
    model = tiny_model("llama")
    others = [p for name, p in model.named_parameters() if frozen or not name.endswith(part)]
    expander = Expander(find_sites(model), **MODES[mode])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and name.endswith(part)))
    optimizer = AdamW(others, lr=0.1)
    if mode == "selected" and part == "embed_tokens.weight":
        expander.attach(optimizer)
        return
    with pytest.raises(ValueError, match=f"{part}.* is not trained by the optimizer"):
        expander.attach(optimizer)
    assert frozen or all(parameter.requires_grad for parameter in model.parameters())


def test_two_expanders_of_the_same_weights_are_refused():
    model = tiny_model("llama")
    optimizer = AdamW(model.parameters(), lr=0.1)
    Expander(find_sites(model)).attach(optimizer)
    expander = Expander(find_sites(model), **MODES["selected"])
    with pytest.raises(RuntimeError, match="another expander of the same weights is attached"):
        expander.attach(optimizer)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_scaled_loss_is_refused_where_it_is_seen():
    """A GradScaler unscales, and looks for overflow in, the main optimizer's parameters only."""
    model = tiny_model("llama")
    run = make_run(model, options={**OPTIONS, "fused": True}, **MODES["half"])
    list(train(run, range(1)))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 1)).backward()
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(run.optimizer)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_another_optimizer_is_refused(kind):
    model = tiny_model("llama")
    expander = Expander(find_sites(model), trainable="selected", threshold=0.25)
    with pytest.raises(ValueError, match=f"the optimizer is {kind.__name__}, allowed.*AdamW"):
        expander.attach(kind(model.parameters(), lr=0.1))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_memory_that_runs_out_in_the_rows_step_is_no_reason_to_repeat_the_batch(monkeypatch):
    """Some rows have moved by then."""
    run, left = make_run(tiny_model("llama"), **MODES["selected"]), [3]

    def fail_later(*args: object, **kwargs: object) -> None:
        left[0] -= 1
        if not left[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. (test)")
        step(*args, **kwargs)

    step = RowAdamW._step
    monkeypatch.setattr(RowAdamW, "_step", fail_later)
    with pytest.raises(RuntimeError, match="the batch would be trained twice") as found:
        list(train(run, range(1)))
    assert "out of memory" not in str(found.value)


def test_a_batch_that_is_given_up_leaves_no_gradient():
    """zero_grad() of the main optimizer, which no longer holds the weights, reaches the rows."""
    run = make_run(tiny_model("llama"), **MODES["selected"])
    list(train(run, range(1)))
    loss_of(run.model, 5).backward()
    parts = run.expander.training.parts()
    assert all(part.copy.grad is not None for part in parts)
    run.optimizer.zero_grad()
    assert all(part.copy.grad is None for part in parts)
    run.expander.attachment.remove()
    assert "zero_grad" not in vars(run.optimizer)
