"""Stages laid over a run, and the learning rate that goes with them."""

from types import SimpleNamespace

import numpy
import pytest
import torch
from composer import Callback, ComposerModel, Trainer
from composer.core import Time, Timestamp, TimeUnit
from torch import nn
from torch.utils.data import DataLoader

from apex_composer.scheduler import (
    Stage,
    StagewiseScheduler,
    convert,
    parse_duration,
    parse_stages,
    plan_stages,
)

PLAIN = {"duration": "2ba", "expansion": False}


def state_of(max_duration: str, dataloader_len: int | None = None, algorithms=(), **time):
    """As much of Composer's State as stages look at."""
    return SimpleNamespace(
        max_duration=Time.from_timestring(max_duration),
        dataloader_len=None if dataloader_len is None else Time(dataloader_len, TimeUnit.BATCH),
        algorithms=list(algorithms),
        timestamp=Timestamp(**time),
    )


def plan_of(stages, max_duration: str, dataloader_len: int | None = None):
    return plan_stages(parse_stages(stages), state_of(max_duration, dataloader_len))


@pytest.mark.parametrize("stages", [1, 3, numpy.int64(3)])
def test_a_number_of_stages(stages):
    assert parse_stages(stages) == stages and type(parse_stages(stages)) is int


def test_a_list_of_stages():
    found = parse_stages(["10ba", Time(1, TimeUnit.EPOCH), PLAIN, {"duration": "0.5dur"}])
    assert found == (
        Stage(Time(10, TimeUnit.BATCH), True),
        Stage(Time(1, TimeUnit.EPOCH), True),
        Stage(Time(2, TimeUnit.BATCH), False),
        Stage(Time(0.5, TimeUnit.DURATION), True),
    )


@pytest.mark.parametrize("stages", [0, -1])
def test_less_than_one_stage_is_refused(stages):
    with pytest.raises(ValueError, match=f"^stages: got {stages}, allowed: a positive int"):
        parse_stages(stages)


@pytest.mark.parametrize("stages", ["3ba", {"duration": "3ba"}, [], 2.5, True, None])
def test_what_is_neither_a_number_nor_a_list_is_refused(stages):
    with pytest.raises(ValueError, match="^stages: got .*, allowed: a number or a list"):
        parse_stages(stages)


@pytest.mark.parametrize(
    "duration",
    ["10", "10 batches", "-1ba", "0ba", "1.5ba", "10sec", "2iter", 10, True, None, ""]
    + ["infba", "nanba", "infdur", "nandur"],
)
def test_what_is_no_duration_is_refused(duration):
    told = "^stages: got .*, allowed: a Composer time string in ba, tok, sp, ep, dur"
    with pytest.raises(ValueError, match=told):
        parse_stages([duration])
    with pytest.raises(ValueError, match=told):
        parse_stages([{"duration": duration}])


@pytest.mark.parametrize(
    ("stages", "total"),
    [
        (["0.5dur", "0.6dur"], "1.1"),
        (["0.5dur", "0.4dur"], "0.9"),
        (["2dur"], "2"),
        (["4ba", "0.7dur", {"duration": "0.7dur", "expansion": False}], "1.4"),
    ],
)
def test_shares_that_are_no_whole_are_refused_at_once(stages, total):
    with pytest.raises(ValueError, match=f"^stages: the shares of training add up to {total}dur"):
        parse_stages(stages)


@pytest.mark.parametrize(
    "stages", [["0.33dur"] * 3, ["0.333dur"] * 3, ["0.1dur"] * 10, ["4ba", "0.5dur"]]
)
def test_rounded_shares_pass(stages):
    assert len(parse_stages(stages)) == len(stages)


def test_zero_is_a_duration_only_where_it_is_allowed():
    assert parse_duration("t_warmup", "0ba", zero=True) == Time(0, TimeUnit.BATCH)
    with pytest.raises(ValueError, match="^t_warmup: got '0ba'"):
        parse_duration("t_warmup", "0ba")


def test_unknown_keys_of_a_stage_are_refused():
    with pytest.raises(TypeError, match="unknown key 'durations'. Did you mean 'duration'"):
        parse_stages([{"durations": "3ba"}])
    with pytest.raises(ValueError, match="^stages: expansion: got 'no', allowed: true, false"):
        parse_stages([{"duration": "3ba", "expansion": "no"}])
    with pytest.raises(ValueError, match="^stages: got None"):
        parse_stages([{"expansion": False}])


@pytest.mark.parametrize(
    ("stages", "max_duration", "unit", "ends"),
    [
        (3, "30000ba", "ba", (10000, 20000, 30000)),
        (3, "10ba", "ba", (3, 6, 10)),
        (1, "7ba", "ba", (7,)),
        (2, "3ep", "ba", (9, 18)),  # 6 batches an epoch
        (4, "1000tok", "tok", (250, 500, 750, 1000)),
        (2, "9sp", "sp", (4, 9)),
        (["1ba", "5ba", "2ba"], "8ba", "ba", (1, 6, 8)),
        (["1ep", "12ba"], "3ep", "ba", (6, 18)),
        (["6ba", "2ep"], "18ba", "ba", (6, 18)),
        (["0.25dur", "0.75dur"], "8ba", "ba", (2, 8)),
        (["0.5dur", "4ba"], "8ba", "ba", (4, 8)),
        (["0.1dur"] * 10, "15ba", "ba", (2, 3, 5, 6, 8, 9, 11, 12, 14, 15)),
        (["0.5dur", "0.5dur"], "3ep", "ba", (9, 18)),
        (["100tok", "900tok"], "1000tok", "tok", (100, 1000)),
        (["0.1dur", "900tok"], "1000tok", "tok", (100, 1000)),
        (["3sp", "4sp"], "7sp", "sp", (3, 7)),
    ],
)
def test_ends_of_stages(stages, max_duration, unit, ends):
    plan = plan_of(stages, max_duration, dataloader_len=6)
    assert (plan.unit.value, plan.ends) == (unit, ends)
    assert plan.starts() == (0, *ends[:-1])


def test_plain_stages_are_kept_and_described():
    plan = plan_of(["1ba", PLAIN, "3ba"], "6ba")
    assert plan.expansion == (True, False, True)
    assert plan.describe() == ["1ba", "3ba (plain)", "6ba"]
    assert plan_of(2, "6ba").expansion == (True, True)


@pytest.mark.parametrize(
    ("stages", "max_duration", "told"),
    [
        (["4ba", "3ba"], "6ba", r"\['4ba', '7ba'\], which is longer than .* 6ba = 6ba"),
        (["4ba", PLAIN], "9ba", r"\['4ba', '6ba \(plain\)'\], which is shorter than"),
        (["0.5dur", "6ba"], "10ba", r"\['5ba', '11ba'\], which is longer than"),
        (["1ep", "1ep"], "3ep", r"\['6ba', '12ba'\], which is shorter than .* 3ep = 18ba"),
        (4, "3ba", r"\['0ba', '1ba', '2ba', '3ba'\] has an empty stage"),
        (["0.01dur", "0.99dur"], "10ba", r"has an empty stage, max_duration is 10ba"),
        (["10tok"], "10ba", "got 10tok, but max_duration is 10ba: give both in the same unit"),
        (["1ep"], "100tok", "got 1ep, but max_duration is 100tok: give both in the same unit"),
    ],
)
def test_stages_that_do_not_fill_the_run_are_refused(stages, max_duration, told):
    with pytest.raises(ValueError, match=f"^stages: .*{told}"):
        plan_of(stages, max_duration, dataloader_len=6)


@pytest.mark.parametrize(("stages", "max_duration"), [(3, "2ep"), (["1ep"], "6ba")])
def test_epochs_without_a_length_are_refused(stages, max_duration):
    with pytest.raises(ValueError, match="stages.*: .ep cannot be laid out.*dataloader has no"):
        plan_of(stages, max_duration)


@pytest.mark.parametrize("max_duration", ["100sec", "5iter"])
def test_a_run_measured_otherwise_is_refused(max_duration):
    """Seconds differ from run to run, so a resumed run would have other stages."""
    with pytest.raises(ValueError, match=f"max_duration.*{max_duration}"):
        plan_of(3, max_duration)


@pytest.mark.parametrize(
    ("unit", "time"),
    [("ba", "batch"), ("tok", "token"), ("sp", "sample")],
)
def test_stages_ended_by_a_time(unit, time):
    plan = plan_of([f"2{unit}", f"3{unit}"], f"5{unit}")
    ended = [plan.ended(Timestamp(**{time: now})) for now in range(7)]
    assert ended == [0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("time", "expected"),
    [("3ba", "3ba"), ("3tok", "3tok"), ("2ep", "12ba"), ("0.26dur", "5ba"), ("1dur", "18ba")],
)
def test_conversion(time, expected):
    state = state_of("3ep", dataloader_len=6)
    assert convert(Time.from_timestring(time), state) == Time.from_timestring(expected)


def rates(scheduler, max_duration, times, unit="batch", **options) -> list[float]:
    return [
        scheduler(state_of(max_duration, algorithms=(), **options, **{unit: time}))
        for time in times
    ]


def test_the_papers_learning_rates_are_the_default():
    found = rates(StagewiseScheduler(), "9ba", range(10))
    assert found == [1.0] * 3 + [0.4] * 3 + [0.1] * 3 + [0.1]


def test_uneven_stages_and_multipliers():
    scheduler = StagewiseScheduler(["1ba", "3ba"], lr_multipliers=[2, 0])
    assert rates(scheduler, "4ba", range(5)) == [2.0, 0.0, 0.0, 0.0, 0.0]


def test_stages_in_tokens():
    scheduler = StagewiseScheduler(["100tok", "50tok"], lr_multipliers=[1, 0.5])
    times = [0, 99, 100, 149]
    assert rates(scheduler, "150tok", times, unit="token") == [1, 1, 0.5, 0.5]


def test_every_stage_warms_up_from_zero():
    scheduler = StagewiseScheduler(2, lr_multipliers=[1.0, 0.4], t_warmup="2ba")
    found = rates(scheduler, "8ba", range(8))
    assert found == pytest.approx([0, 0.5, 1, 1, 0, 0.2, 0.4, 0.4])


def test_a_warmup_per_stage():
    scheduler = StagewiseScheduler(2, lr_multipliers=[1.0, 0.4], t_warmup=["0ba", "0.5dur"])
    found = rates(scheduler, "8ba", range(8))
    assert found == pytest.approx([1, 1, 1, 1, 0, 0.1, 0.2, 0.3])


def test_a_warmup_in_epochs():
    scheduler = StagewiseScheduler(1, lr_multipliers=[1.0], t_warmup="1ep")
    found = rates(scheduler, "2ep", range(5), dataloader_len=2)
    assert found == [0, 0.5, 1, 1, 1]


def test_a_warmup_in_another_unit_is_refused():
    scheduler = StagewiseScheduler(3, t_warmup="10tok")
    with pytest.raises(ValueError, match="^t_warmup: got 10tok, but the stages are in ba"):
        scheduler(state_of("9ba"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"stages": 2}, r"^lr_multipliers: got 3 values for 2 stages, allowed: one each$"),
        ({"stages": ["1ba"] * 4}, r"^lr_multipliers: got 3 values for 4 stages"),
        ({"t_warmup": ["1ba", "1ba"]}, r"^t_warmup: got 2 values for 3 stages"),
        ({"t_warmup": "1"}, r"^t_warmup: got '1', allowed: a Composer time string"),
        ({"t_warmup": "-1ba"}, r"^t_warmup: got '-1ba'"),
        (
            {"lr_multipliers": [1, 0.4, -0.1]},
            r"^lr_multipliers: got .*-0\.1.*allowed: numbers of 0 or more",
        ),
        ({"stages": 0}, r"^stages: got 0"),
        ({"lr_multipliers": 0.5}, r"^lr_multipliers: got 0\.5"),
        ({"lr_multipliers": [1, "x", 2]}, r"^lr_multipliers: got .*x"),
        ({"t_warmup": 0}, r"^t_warmup: got 0"),
        ({"t_warmup": "infdur"}, r"^t_warmup: got 'infdur'"),
        ({"lr_multipliers": [1, float("nan"), 2]}, r"^lr_multipliers: got nan"),
        ({"lr_multipliers": [1, float("inf"), 2]}, r"^lr_multipliers: got inf"),
        ({"lr_multipliers": [True, 1, 2]}, r"^lr_multipliers: got True"),
    ],
)
def test_settings_out_of_range_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        StagewiseScheduler(**settings)


def test_unknown_settings_are_refused():
    with pytest.raises(TypeError, match="stagewise: unknown key 'warmup'. Did you mean 't_warmup'"):
        StagewiseScheduler(warmup="1ba")


def test_a_stretched_schedule_is_refused():
    with pytest.raises(ValueError, match="^scale_schedule_ratio: got 0.5, allowed with stagewise"):
        StagewiseScheduler()(state_of("9ba"), ssr=0.5)


def test_a_longer_second_fit_is_laid_out_anew():
    scheduler = StagewiseScheduler(2, lr_multipliers=[1.0, 0.5])
    assert rates(scheduler, "4ba", [1, 2]) == [1.0, 0.5]
    assert rates(scheduler, "8ba", [2, 4]) == [1.0, 0.5]


class Planned:
    """An algorithm with stages, as the scheduler sees it."""

    def __init__(self, stages):
        self.stages = parse_stages(stages)

    def stage_plan(self, state):
        return plan_stages(self.stages, state)


def test_the_algorithms_stages_must_be_the_same():
    scheduler = StagewiseScheduler(2, lr_multipliers=[1.0, 0.5])
    same = state_of("8ba", algorithms=[object(), Planned(["4ba", "0.5dur"])])
    assert scheduler(same) == 1.0
    scheduler = StagewiseScheduler(2, lr_multipliers=[1.0, 0.5])
    other = state_of("8ba", algorithms=[Planned(["3ba", "5ba"])])
    told = r"stagewise ends them at \['4ba', '8ba'\], the algorithm apex at \['3ba', '8ba'\]"
    with pytest.raises(ValueError, match=f"^stages: .*{told}: give both the same stages"):
        scheduler(other)


class Line(ComposerModel):
    """A model of one weight; the scheduler does not care."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, batch):
        return self.layer(batch)

    def loss(self, outputs, batch):
        return outputs.square().mean()


class Rates(Callback):
    """The learning rate that every batch was trained with."""

    def __init__(self):
        self.seen = []

    def batch_start(self, state, logger):
        self.seen.append(state.optimizers[0].param_groups[0]["lr"])


def fit(scheduler, max_duration: str) -> list[float]:
    model, rates = Line(), Rates()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(torch.ones(6, 1), batch_size=2),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.5),
        schedulers=scheduler,
        max_duration=max_duration,
        callbacks=[rates],
        device="cpu",
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return rates.seen


@pytest.mark.parametrize("max_duration", ["6ba", "2ep"])
def test_a_stages_learning_rate_arrives_one_batch_late_under_composer(max_duration):
    """Documented: Composer steps schedulers before its clock advances."""
    found = fit(StagewiseScheduler(2, lr_multipliers=[1.0, 0.4]), max_duration)
    assert found == pytest.approx([0.5, 0.5, 0.5, 0.5, 0.2, 0.2])


def test_stages_that_do_not_fit_are_refused_before_the_first_batch():
    with pytest.raises(ValueError, match="^stages: they end at .* which is longer than training"):
        fit(StagewiseScheduler(["9ba"], lr_multipliers=[1.0]), "6ba")


@pytest.mark.parametrize(
    ("warmup", "told"),
    [("5ba", "t_warmup: got 5ba, allowed: no longer than its stage .4ba"), ("5sp", "same unit")],
)
def test_a_warmup_that_does_not_fit_its_stage_is_refused(warmup, told):
    scheduler = StagewiseScheduler(stages=["6ba", "4ba"], lr_multipliers=[1, 1], t_warmup=warmup)
    with pytest.raises(ValueError, match=told):
        scheduler(state_of("10ba"))
