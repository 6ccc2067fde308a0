"""Where stages end, and how checkpoints keep it."""

from pathlib import Path

import pytest
from composer.core import Timestamp

from apex_composer.tools.checkpoint_file import read_checkpoint
from apex_composer.trainer.stage_plan import StagePlan

PLAN = StagePlan("tok", (100, 300, 600), (True, False, True))


@pytest.mark.parametrize(
    ("unit", "time"),
    [("ba", "batch"), ("tok", "token"), ("sp", "sample")],
)
def test_stages_ended_by_a_time(unit, time):
    plan = StagePlan(unit, (2, 5), (True, True))
    ended = [plan.ended(Timestamp(**{time: now})) for now in range(7)]
    assert ended == [0, 0, 1, 1, 1, 2, 2]


def test_a_plan_is_described_as_composer_writes_times():
    assert PLAN.describe() == ["100tok", "300tok (plain)", "600tok"]


def test_checkpoints_keep_a_plan_as_numbers():
    saved = PLAN.state_dict()
    assert saved == {"unit": "tok", "ends": [100, 300, 600], "expansion": [True, False, True]}
    assert StagePlan.from_state(saved) == PLAN


def test_the_text_of_older_checkpoints_is_read():
    assert StagePlan.from_state(["100tok", "300tok (plain)", "600tok"]) == PLAN
    assert StagePlan.from_state(["4ba"]) == StagePlan("ba", (4,), (True,))


def test_the_commands_read_a_checkpoint_of_version_0_1():
    path = Path(__file__).parents[1] / "before_rooms" / "ep0-ba5-rank0.pt"
    checkpoint = read_checkpoint(path)
    assert checkpoint.plan == StagePlan("ba", (4, 7, 9), (True, True, True))
    assert checkpoint.ended == 1


def test_the_first_stages_of_a_plan():
    assert PLAN.first(2) == StagePlan("tok", (100, 300), (True, False))
