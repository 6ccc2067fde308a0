"""Runs that start at the same moment do not take each other's names."""

import multiprocessing
import os
import subprocess
import sys

import own_names
from streaming.base.shared import prefix
from streaming.base.world import World

RUNS = 4


def take_together(moment, ends) -> None:
    """Take a dataset's number, with everybody's search for one over before anybody takes any."""
    search = prefix._check_and_find_retrying

    def search_together(*arguments, **settings):
        found = search(*arguments, **settings)
        moment.wait(60)
        return found

    prefix._check_and_find_retrying = search_together
    try:
        number, memory = prefix.get_shm_prefix(["/data"], [None], World.detect())
        moment.wait(60)
        memory.cleanup()
        ends.put(number)
    except Exception as error:
        moment.abort()
        ends.put(repr(error))


def test_runs_that_start_at_the_same_moment_take_different_numbers():
    fork = multiprocessing.get_context("fork")
    moment, ends = fork.Barrier(RUNS), fork.SimpleQueue()
    runs = [fork.Process(target=take_together, args=(moment, ends)) for _ in range(RUNS)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    found = [ends.get() for _ in runs]
    assert set(map(type, found)) == {int} and len(set(found)) == RUNS, found


def test_ranks_agree_on_the_numbers_of_their_launcher(monkeypatch):
    own = next(own_names.numbers())
    monkeypatch.setenv("WORLD_SIZE", "2")
    theirs = next(own_names.numbers())
    assert own - theirs == 1_000 * (os.getpid() - os.getppid())
    assert min(own, theirs) > 1_000_000  # behind those of runs that are not tests


def test_a_script_is_run_under_names_of_its_own(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys; from streaming.base.shared import prefix\n"
        "print(os.getpid(), next(prefix._each_prefix_int()), sys.argv, sys.path[0], __name__)\n"
    )
    command = [sys.executable, own_names.__file__, str(script), "a", "b"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    process, told = done.stdout.split(maxsplit=1)
    expected = (1_000_000 + 1_000 * int(process), [str(script), "a", "b"], tmp_path, "__main__")
    assert told == " ".join(map(str, expected)) + "\n"
