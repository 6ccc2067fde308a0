import os
import signal

import pytest

from apex_composer.data_prep.engines.local import run_tasks
from apex_composer.data_prep.errors import WorkerDiedError


def die(task, report):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_an_error_that_names_its_task():
    with pytest.raises(WorkerDiedError, match=r"signal 9 \(SIGKILL\) at some/file(.|\n)*memory"):
        list(run_tasks(die, iter([{"name": "some/file"}]), 2))


def fail(task, report):
    raise ValueError(f"{task['name']} is bad")


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_task_raises_is_raised(workers):
    with pytest.raises(ValueError, match="that is bad"):
        list(run_tasks(fail, iter([{"name": "that"}]), workers))
