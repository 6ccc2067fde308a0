"""Stages laid over a run: what the settings may say, and where the stages end."""

import numpy
import pytest
import torch
from composer.core import Time, TimeUnit
from composer_run import state_of

from apex_composer.trainer.stages import Stage, convert, parse_duration, parse_stages, plan_stages

PLAIN = {"duration": "2ba", "expansion": False}


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
    + ["infba", "nanba", "infdur", "nandur", torch.tensor(3), torch.tensor([3, 4])],
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
    assert (plan.unit, plan.ends) == (unit, ends)
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
    ("time", "expected"),
    [("3ba", "3ba"), ("3tok", "3tok"), ("2ep", "12ba"), ("0.26dur", "5ba"), ("1dur", "18ba")],
)
def test_conversion(time, expected):
    state = state_of("3ep", dataloader_len=6)
    assert convert(Time.from_timestring(time), state) == Time.from_timestring(expected)
