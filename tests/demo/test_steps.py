import re
from pathlib import Path

import pytest

from apex_composer.demo.configuration import DEFAULT_YAML, load_template
from apex_composer.demo.steps import describe_steps, expected_minutes, show_minutes

README = (Path(__file__).parents[2] / "README.md").read_text()


def minutes_of(*overrides):
    return expected_minutes(load_template(DEFAULT_YAML, Path("runs/x"), overrides))


def test_every_step_is_named_with_its_minutes_and_the_whole_is_that_of_the_readme():
    minutes = minutes_of()
    *steps, total = describe_steps(minutes).splitlines()
    for step, line in zip(("data", "base", "vanilla", "apex"), steps, strict=True):
        assert step in line and line.endswith(show_minutes(minutes[step]))
    [promised] = re.findall(r"`make train` +takes about (\d+) minutes on 2 CPU cores", README)
    assert total.startswith(f"about {promised} min in all on 2 CPU cores")


def test_fewer_batches_take_less():
    less = minutes_of("variables.batches=30", "variables.base_batches=80")
    assert {step for step, minutes in minutes_of().items() if less[step] < minutes} == {
        "base", "vanilla", "apex",
    }  # fmt: skip


@pytest.mark.parametrize(("minutes", "shown"), [(0.1, 1), (1.5, 2), (3.8, 4), (8.6, 9)])
def test_minutes_are_whole(minutes, shown):
    assert show_minutes(minutes) == f"about {shown} min"
