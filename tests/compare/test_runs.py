import os

import pytest

from apex_composer.compare.configuration import Run
from apex_composer.compare.runs import changed_environment, finished_result, run_all
from apex_composer.compare.worker import RESULT
from apex_composer.data_prep.atomic_files import read_json, write_json


@pytest.fixture
def runs(tmp_path):
    names = ("full", "broken", "lora")
    return [Run(name, 17, tmp_path / name, {"run_name": name}, f"id-{name}") for name in names]


@pytest.fixture
def started():
    return []


@pytest.fixture
def start(started):
    def start(run):
        started.append(run.method)
        if run.method == "broken":
            return 3
        write_json(run.folder / RESULT, {"identity": run.identity, "number": len(started)})
        return 0

    return start


def test_a_run_that_fails_stops_no_other_and_is_named_with_its_log(runs, start, started):
    errors = run_all(runs, start)
    assert started == ["full", "broken", "lora"]
    assert errors == {"broken, seed 17": f"status 3, see {runs[1].folder / 'log.txt'}"}
    assert (runs[0].folder / "config.yaml").read_text() == "run_name: full\n"


def test_what_is_finished_is_not_run_again(runs, start, started):
    run_all(runs, start)
    run_all(runs, start)
    assert started == ["full", "broken", "lora", "broken"]
    assert [run.method for run in runs if finished_result(run)] == ["full", "lora"]


def test_changed_settings_run_again_and_leave_no_old_result(runs, start, started):
    run_all(runs, start)
    other = [Run(run.method, 17, run.folder, run.settings, "other") for run in runs]
    assert not any(map(finished_result, other))
    run_all(other[:1], start)
    assert started[-1] == "full" and finished_result(other[0])["number"] == 4
    run_all(other[2:], lambda run: 9)  # ended before it had a result
    assert read_json(runs[2].folder / RESULT) is None


def test_the_environment_is_left_as_it_was(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    before = dict(os.environ)
    with changed_environment({"OMP_NUM_THREADS": "1", "APEX_NEW": "x"}):
        assert (os.environ["OMP_NUM_THREADS"], os.environ["APEX_NEW"]) == ("1", "x")
    assert dict(os.environ) == before
