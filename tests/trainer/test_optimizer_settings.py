"""A resumed run's optimizer is that of its settings, and otherwise what the checkpoint left."""

import re
import warnings

import numpy
import pytest
import torch
from composer.optim import DecoupledAdamW

from apex_composer.trainer.optimizer_settings import put_back, read_settings

GIVEN = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}


def optimizer_of(**settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], **{**GIVEN, **settings})


def resumed(trained: dict, now: dict, *, moved: dict | None = None, recorded: bool = True):
    """An optimizer after loading another's state; `moved` by training, not by settings."""
    first, second = optimizer_of(**trained), optimizer_of(**now)
    settings, given = read_settings(first), read_settings(second)
    first.param_groups[0].update(moved or {})
    second.load_state_dict(first.state_dict())
    put_back(second, given, settings if recorded else None, [])
    return second.param_groups[0]


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "older checkpoint"])
@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("weight_decay", 0.2, "weight_decay: the checkpoint .* with 0.1, this run says 0.2"),
        ("betas", (0.8, 0.95), r"betas: .* with \[0.9, 0.95\], this run says \[0.8, 0.95\]"),
        ("eps", 1e-6, "eps: .* with 1e-08, this run says 1e-06, which holds from here on"),
        ("maximize", True, "maximize: .* with False, this run says True"),
        ("lr", 2e-2, "lr: .* with 0.01, this run says 0.02"),
    ],
)
def test_a_changed_setting_is_put_back_with_a_warning(name, value, told, recorded):
    with pytest.warns(UserWarning, match=told):
        group = resumed({}, {name: value}, recorded=recorded)
    assert group[name] == value and type(group[name]) is type(value)


def test_an_older_checkpoint_does_not_tell_settings_from_training():
    """Training itself may have moved the value; the settings hold, and the warning says both."""
    told = (
        "weight_decay: the checkpoint goes on with 0.0081, this run says 0.1, which holds .*"
        "does not record its run's settings.* training itself .*set it to 0.0081"
    )
    with pytest.warns(UserWarning, match=told):
        group = resumed({}, {}, moved={"weight_decay": 0.0081}, recorded=False)
    assert group["weight_decay"] == 0.1


@pytest.mark.parametrize("recorded", [True, False])
def test_unchanged_settings_are_left_alone_in_silence(recorded):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = resumed({}, {}, recorded=recorded)
    assert {name: group[name] for name in GIVEN} == GIVEN


def test_what_training_has_moved_stays():
    """Schedules of weight decay or momentum, and counters that optimizers keep in groups."""
    moved = {"weight_decay": 0.05, "betas": (0.7, 0.95), "k": 12}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = resumed({}, {}, moved=moved)
    assert {name: group[name] for name in moved} == moved


def test_a_rate_keeps_its_place_in_the_schedule():
    """Base 0.01 at a quarter: with base 0.02 a quarter too, and for the schedulers as well."""
    first, second = optimizer_of(), optimizer_of(lr=2e-2)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda _: 1.0) for o in (first, second)]
    trained, given = read_settings(first), read_settings(second)
    first.param_groups[0]["lr"] = 0.0025
    second.load_state_dict(first.state_dict())
    schedulers[1].load_state_dict(schedulers[0].state_dict())
    with pytest.warns(UserWarning, match="^lr: "):
        put_back(second, given, trained, schedulers[1:])
    assert second.param_groups[0]["lr"] == pytest.approx(0.005)
    assert second.param_groups[0]["initial_lr"] == 0.02 and schedulers[1].base_lrs == [0.02]


def test_a_scheduler_may_be_new():
    """Optimizers without one have no base rate."""
    first, second = optimizer_of(), optimizer_of(weight_decay=0.2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(second, lambda _: 0.5)
    given = read_settings(second)
    second.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match="^weight_decay: "):
        put_back(second, given, None, [scheduler])
    assert scheduler.base_lrs == [0.01]


def test_the_schedulers_within_a_scheduler_follow_too():
    """torch's SequentialLR has no base rates, those in it have."""

    def scheduled(lr):
        optimizer = optimizer_of(lr=lr)
        parts = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _, f=f: f) for f in (1, 0.5)]
        return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [2])

    (first, before), (second, scheduler) = scheduled(1e-2), scheduled(2e-2)
    trained, given = read_settings(first), read_settings(second)
    second.load_state_dict(first.state_dict())
    scheduler.load_state_dict(before.state_dict())
    with pytest.warns(UserWarning, match="^lr: .* 0.01, this run says 0.02, which holds"):
        put_back(second, given, trained, [scheduler])
    rates = []
    for _ in range(3):
        rates.append(second.param_groups[0]["lr"])
        second.step()
        scheduler.step()
    assert rates == [0.02, 0.02, 0.01]


MOVED = r"^lr: .*base rates \[0.01\], .* \[0.02\], which"


@pytest.mark.parametrize(
    ("trained", "state", "told"),
    [
        (1e-2, False, MOVED),  # the optimizer is of another kind
        (2e-2, False, None),  # and moved by training
        (None, True, MOVED),  # an older checkpoint's other order
        (None, False, None),  # nothing was loaded
    ],
)
def test_base_rates_are_those_of_the_param_groups(trained, state, told):
    """Schedulers are loaded by the groups' order, also where the optimizer is not."""
    optimizer = optimizer_of(lr=2e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    given = read_settings(optimizer)
    scheduler.base_lrs = [1e-2]
    if state:
        optimizer.state[optimizer.param_groups[0]["params"][0]] = {"step": torch.tensor(3.0)}
    record = None if trained is None else [{**given[0], "lr": trained}]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        put_back(optimizer, given, record, [scheduler])
    assert scheduler.base_lrs == [2e-2 if told else 1e-2]
    assert len(warned) == (told is not None)
    assert told is None or re.search(told, str(warned[0].message))


GROUPINGS = {
    "swapped": lambda weight, bias: [[bias], [weight]],
    "merged": lambda weight, bias: [[weight, bias]],
}


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_other_param_groups_are_refused(grouping):
    """Rates, weight decay and schedulers go by the groups' order, moments by name."""
    model = torch.nn.Linear(2, 1)
    weight, bias = model.parameters()
    record = read_settings(torch.optim.AdamW([{"params": [weight]}, {"params": [bias]}]), model)
    groups = [{"params": params} for params in GROUPINGS[grouping](weight, bias)]
    optimizer = torch.optim.AdamW(groups)
    given = read_settings(optimizer, model)
    told = "^optimizer: .*param group.*same order.*load_weights_only: true"
    with pytest.raises(ValueError, match=told):
        put_back(optimizer, given, record, [])


def test_an_order_within_a_group_does_not_count():
    """Wrapping may change it; moments are found by name."""
    model = torch.nn.Linear(2, 1)
    weight, bias = model.parameters()
    one, other = (torch.optim.AdamW(params) for params in ([weight, bias], [bias, weight]))
    assert read_settings(one, model) == read_settings(other, torch.nn.DataParallel(model))
    assert read_settings(one, model)[0]["params"] == ["bias", "weight"]
    assert "params" not in read_settings(one, torch.nn.Linear(2, 1))[0]


@pytest.mark.parametrize("lr", [torch.tensor(1e-2), numpy.float32(1e-2)], ids=["tensor", "numpy"])
def test_a_rate_stays_the_kind_of_number_that_it_is(lr):
    """float32 and float64 round otherwise."""
    first, second = optimizer_of(lr=lr), optimizer_of(lr=lr * 2)
    trained, given = read_settings(first), read_settings(second)
    assert [type(settings[0]["lr"]) for settings in (trained, given)] == [float, float]
    second.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match="^lr: .* 0.00999.*, this run says 0.0199"):
        put_back(second, given, trained, [])
    assert type(second.param_groups[0]["lr"]) is type(lr)
    assert second.param_groups[0]["lr"] == lr * 2


@pytest.mark.parametrize("name", ["amsgrad", "foreach"])
def test_what_does_not_fit_the_moments_stays_with_a_warning(name):
    with pytest.warns(UserWarning, match=f"{name}: .*says True, but .*load_weights_only"):
        group = resumed({name: False}, {name: True})
    assert group[name] is False


def test_what_needs_moments_can_be_turned_off():
    with pytest.warns(UserWarning, match="amsgrad: .*with True, this run says False, which holds"):
        assert resumed({"amsgrad": True}, {"amsgrad": False})["amsgrad"] is False


def test_settings_are_plain_data():
    settings = read_settings(DecoupledAdamW([torch.nn.Parameter(torch.ones(2))], **GIVEN))
    assert settings == [{**GIVEN, "betas": [0.9, 0.95], "amsgrad": False} | settings[0]]
    assert "params" not in settings[0] and "initial_lr" not in settings[0]
