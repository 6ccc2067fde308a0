"""Training of some rows equals that by autograd, is resumable, and leaves an ordinary model."""

import copy
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers import CHANGE_BOUND, SMOOTH_EPS, change_error
from row_runs import (
    MODES,
    OPTIONS,
    STEPS,
    compare,
    loss_of,
    make_run,
    train,
)
from tiny_models import in_float64, tiny_model
from torch.optim import AdamW

from apex_composer import Expander, find_sites
from apex_composer.trainable import training


@pytest.mark.numeric
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "gpt_neox", "phi3"])
def test_training_equals_autograd(mode, model_type):
    """Grouped heads, biases, transposed weights, and both ways to fuse projections."""
    with in_float64():
        model, twin, start = (tiny_model(model_type, torch.float64) for _ in range(3))
        run = make_run(model, **MODES[mode])
        compare(run, twin)
    expected, before = twin.state_dict(), start.state_dict()
    changed = 0
    for name, weight in model.state_dict().items():
        difference = (weight - expected[name]).abs().max()
        assert difference <= 1e-10 * expected[name].abs().max(), name
        changed += int((weight != before[name]).sum())
    trained = run.expander.share.trained - sum(
        factor.numel() for operator in run.expander.operators for factor in operator.factors
    )
    # Units change from stage to stage, rows that no token reaches stay.
    assert 0.5 * trained < changed < before_numel(start)


def before_numel(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.numeric
@pytest.mark.parametrize("mode", ["selected", "half"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_rows_of_weights_in_bfloat16_are_trained_in_float32(mode, model_type):
    """The model computes with the rounded rows, whose rounding does not add up."""
    model, twin, start = (tiny_model(model_type, torch.bfloat16) for _ in range(3))
    options = {**OPTIONS, "eps": SMOOTH_EPS}
    run = make_run(model, options=options, **MODES[mode])
    oracle = compare(run, twin, options)
    effective = oracle.effective()
    for own in run.expander.training.rows.values():
        copied = own.parts[0].copy.detach()
        name, indices = own.site.name.split("[")[0], own.site.indices(own.units)
        expected = effective[name].detach().index_select(own.site.axis, indices)
        begun = start.get_parameter(name).float().index_select(own.site.axis, indices)
        assert copied.dtype == torch.float32
        assert change_error(copied, expected, begun) < CHANGE_BOUND
        found = model.get_parameter(name).index_select(own.site.axis, indices)
        assert torch.equal(found, copied.bfloat16())


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_goes_on_with_the_same_bits(mode, dtype, attach_first):
    run = make_run(tiny_model("qwen2", dtype), **MODES[mode])
    for step, _ in train(run, range(STEPS)):
        if step == 3:  # in the middle of the second stage
            saved = {name: copy.deepcopy(part.state_dict()) for name, part in vars(run).items()}
    resumed = make_run(tiny_model("qwen2", dtype, seed=1), attach=attach_first, **MODES[mode])
    resumed.model.load_state_dict(saved["model"])
    resumed.expander.load_state_dict(saved["expander"])
    if not attach_first:
        resumed.expander.attach(resumed.optimizer)
    resumed.optimizer.load_state_dict(saved["optimizer"])
    list(train(resumed, range(3, STEPS)))
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_saved_rows_are_loaded_where_they_were_whatever_the_seed():
    """Others would be drawn with another one; a branch may change it within a stage."""
    run = make_run(tiny_model("llama"), **MODES["half"])
    list(train(run, range(1)))
    saved = run.expander.state_dict()
    other = make_run(copy.deepcopy(run.model), seed=18, **MODES["half"])
    other.expander.load_state_dict({**saved, "settings": other.expander.settings()})
    for name, own in other.expander.training.rows.items():
        assert torch.equal(own.units, saved["rows"][name]["units"])
    other.expander.training.write()
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, other.model.state_dict()[name]), name


def test_saved_rows_of_other_weights_are_refused():
    """Embeddings have copies in a lower precision only."""
    models = [tiny_model("llama", dtype) for dtype in (torch.float32, torch.bfloat16)]
    runs = [make_run(model, **MODES["half"]) for model in models]
    for run, other in zip(runs, runs[::-1], strict=True):
        list(train(run, range(1)))
        with pytest.raises(ValueError, match="trained weights: .*embed_tokens"):
            other.expander.load_state_dict(run.expander.state_dict())


@pytest.mark.parametrize("way", ["loaded", "attached again"])
def test_rows_that_stay_keep_their_moments_in_whatever_order_things_are_called(way):
    """A stage that begins behind loading and before attaching; a handle that is given back."""
    run = make_run(tiny_model("llama"), **MODES["selected"])
    list(train(run, range(2)))
    other = run
    if way == "loaded":
        other = make_run(copy.deepcopy(run.model), attach=False, **MODES["selected"])
        other.expander.load_state_dict(run.expander.state_dict())
        next(train(other, range(2, 3)))
    else:
        run.expander.attachment.remove()
    other.expander.attach(other.optimizer)
    own = other.expander.training
    steps = torch.cat([own.optimizer.state[part.copy]["steps"] for part in own.parts()])
    assert float(steps.max()) == 2


def test_a_bias_follows_its_own_param_group():
    """Which has no weight decay, in most settings."""
    model = tiny_model("qwen2")
    matrices, others = ([p for p in model.parameters() if (p.dim() > 1) == two] for two in (1, 0))
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer, expander = AdamW(groups, **OPTIONS), Expander(find_sites(model), **MODES["selected"])
    expander.attach(optimizer)
    run = SimpleNamespace(model=model, optimizer=optimizer, expander=expander)
    list(train(run, range(1)))
    decays = {
        copied.dim(): group["decay"]
        for group in expander.training.optimizer.param_groups
        for copied in group["params"]
    }
    assert decays == {1: 0.0, 2: pytest.approx(OPTIONS["lr"] * OPTIONS["weight_decay"])}


def test_what_is_frozen_keeps_its_bits_and_gets_no_memory():
    model = tiny_model("llama")
    start = copy.deepcopy(model.state_dict())
    run = make_run(model, trainable="selected", threshold=0.25)
    list(train(run, range(3)))
    assert not run.optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())
    expanded = {own.site.name for own in run.expander.training.rows.values()}
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, start[name]) == (name not in expanded), name
    run.expander.remove()
    assert all(parameter.requires_grad for parameter in model.parameters())
    groups = run.optimizer.param_groups
    assert [id(p) for p in groups[0]["params"]] == [id(p) for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_others_change_are_taken_as_they_are(dtype):
    """Exchanged and put back, they change nothing, not even what is rounded away in the model."""
    runs = [make_run(tiny_model("llama", dtype), **MODES["selected"]) for _ in range(3)]
    steps = [train(run, range(4)) for run in runs]
    for _ in range(3):
        [next(step) for step in steps]
    plain, swapped, changed = (run.model for run in runs)
    weight = next(iter(runs[1].expander.training.rows.values())).site.name
    with torch.no_grad():
        parameter = swapped.get_parameter(weight)
        kept = parameter.clone()
        parameter.zero_().copy_(kept)
        changed.get_parameter(weight).zero_()
    [list(step) for step in steps]
    for name, expected in plain.state_dict().items():
        assert torch.equal(swapped.state_dict()[name], expected), name
    rates = OPTIONS["lr"] * 1.5 * len(steps)
    assert (
        changed.get_parameter(weight).abs().max() < rates < plain.get_parameter(weight).abs().max()
    )


def test_gradients_are_clipped_together():
    """Rows and what is trained whole have one norm, that of torch over all that is trained."""
    run = make_run(tiny_model("llama", torch.float64), **MODES["half"])
    list(train(run, range(1)))
    loss_of(run.model, 5).backward()
    training = run.expander.training
    leaves = [part.copy for part in training.parts()]
    leaves += [p for p in run.model.parameters() if p.grad is not None]
    copies = [torch.nn.Parameter(leaf.detach().clone()) for leaf in leaves]
    for twin, leaf in zip(copies, leaves, strict=True):
        twin.grad = leaf.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(copies, 0.01)
    assert float(training.clip_grad_norm(0.01)) == pytest.approx(float(expected), rel=1e-12)
    for twin, leaf in zip(copies, leaves, strict=True):
        torch.testing.assert_close(leaf.grad, twin.grad)


def test_a_stage_begins_with_one_weight_held_twice(monkeypatch):
    """Rows of one site are copied, and those of the stage before dropped, before the next's."""
    run = make_run(tiny_model("llama"), **MODES["selected"])
    list(train(run, range(2)))
    before = [weakref.ref(part.copy) for part in run.expander.training.parts()]
    count, held, make = len(before), [], training.make_rows

    def make_rows(*arguments):
        held.append(sum(copied() is not None for copied in before))
        return make(*arguments)

    monkeypatch.setattr(training, "make_rows", make_rows)
    list(train(run, range(2, 3)))
    assert held == [*range(count, 0, -1)]


def test_before_the_first_stage_what_is_trained_whole_is_clipped_alone():
    run = make_run(tiny_model("llama"), **MODES["half"])
    loss_of(run.model, 0).backward()
    norm = float(run.expander.training.clip_grad_norm(1e9))
    kept = {id(p) for p in run.expander.training._whole}
    own = [p.grad.norm() for p in run.model.parameters() if id(p) in kept]
    assert len(own) == 2 and norm == pytest.approx(float(torch.stack(own).norm()), rel=1e-6)
