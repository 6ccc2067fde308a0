"""Time is added up while the stopwatch runs, and read without waiting inside the blocks."""

import time

import pytest
import torch

from apex_composer.stopwatch import Stopwatch

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told to: `clock.now += seconds`."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(time, "perf_counter", lambda: Clock.now)
    return Clock


def test_blocks_add_up_until_read(clock):
    stopwatch = Stopwatch()
    stopwatch.running = True
    for seconds in (0.25, 0.5):
        with stopwatch.block(CPU):
            clock.now += seconds
        clock.now += 10  # between the blocks
    assert stopwatch.read() == 750.0
    assert stopwatch.read() == 0.0


def test_nothing_counts_while_it_is_off(clock):
    stopwatch = Stopwatch()
    with stopwatch.block(CPU):
        clock.now += 1
    assert stopwatch.read() == 0.0


def test_errors_pass_through(clock):
    stopwatch = Stopwatch()
    for stopwatch.running in (False, True):
        with pytest.raises(KeyError), stopwatch.block(CPU):
            raise KeyError("x")
    with stopwatch.block(CPU):
        clock.now += 1
    assert stopwatch.read() == 1000.0


def test_cuda_is_waited_for_only_when_read(monkeypatch):
    order = []

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing

        def record(self):
            order.append("record")

        def synchronize(self):
            order.append("wait")

        def elapsed_time(self, end):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    stopwatch = Stopwatch()
    stopwatch.running = True
    for _ in range(2):
        with stopwatch.block(torch.device("cuda", 0)):
            order.append("work")
    assert order == ["record", "work", "record"] * 2
    assert stopwatch.read() == 4.0
    assert order[6:] == ["wait", "wait"]
    assert stopwatch.read() == 0.0
