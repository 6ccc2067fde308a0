import re
import threading
import time

import pytest
from composer import Callback
from composer_run import make_trainer

from apex_composer.callbacks.heartbeat import Heartbeat


class Slow(Callback):
    """Waits long enough at an event for a few lines."""

    def __init__(self, event: str):
        self.event = event

    def run_event(self, event, state, logger):
        if event.value == self.event and state.timestamp.batch.value == 0:
            time.sleep(0.2)


def beats() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "apex-heartbeat"]


@pytest.mark.parametrize(
    ("event", "phase"),
    [
        ("init", "building the trainer and loading the checkpoint"),
        ("fit_start", "first evaluation and first assessment"),
        ("after_dataloader", "waiting for the first batch of data"),
        ("after_forward", "first step"),
    ],
)
def test_it_says_what_the_run_waits_for_until_the_first_batch_is_done(capfd, event, phase):
    # The loader is slow for the callback that waits after it; lines end with the first batch.
    trainer = make_trainer(callbacks=(Heartbeat(seconds=0.05), Slow(event)), max_duration="2ba")
    trainer.fit()
    trainer.close()
    lines = [line for line in capfd.readouterr().err.splitlines() if phase in line]
    assert lines and all(
        re.fullmatch(rf"apex-composer: {phase}, \d+ s \(\d+ s since the start\)", line)
        for line in lines
    )
    deadline = time.monotonic() + 5
    while beats() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not beats()


def test_a_wait_of_centuries_does_not_end_the_thread():
    heartbeat = Heartbeat(seconds=1e12)
    time.sleep(0.05)
    assert len(beats()) == 1
    heartbeat.close(None, None)


def test_settings_are_checked():
    for wrong in (0, True, "30", float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"heartbeat: seconds: got {wrong!r}"):
            Heartbeat(seconds=wrong)
    with pytest.raises(TypeError, match="Did you mean 'seconds'"):
        Heartbeat(second=1)
