import shutil
from types import SimpleNamespace

import pytest

from apex_composer.callbacks.disk import (
    Clock,
    check_disk,
    checkpoint_bytes,
    count_kept,
    count_saves,
    free_bytes,
    moments,
    split_time,
)

CLOCK = Clock(samples=64, length=4096)


@pytest.mark.parametrize(
    ("max_duration", "interval", "saves"),
    [
        ("30000ba", "1000ba", 30),
        ("30001ba", "1000ba", 31),
        ("30000ba", "1dur", 1),
        ("30000ba", "0.1dur", 10),
        ("2_621_440_000tok", "1000ba", 10),
        ("640sp", "5ba", 2),
        ("3ep", "1ep", 3),
        (3, 1, 3),
        ("3ep", "1000ba", None),
    ],
)
def test_number_of_checkpoints(max_duration, interval, saves):
    assert count_saves(max_duration, interval, CLOCK) == saves


@pytest.mark.parametrize(
    ("saves", "keep", "kept"),
    [(30, -1, 30), (30, 2, 3), (2, 5, 2), (None, 2, 3), (None, -1, None), (30, 0, 1)],
)
def test_number_on_the_disk_at_the_same_time(saves, keep, kept):
    assert count_kept(saves, keep) == kept


def test_a_checkpoint_of_tinyllama_has_13_gigabytes():
    assert checkpoint_bytes(1_100_048_384, moments("decoupled_adamw")) == 13_200_580_608
    assert checkpoint_bytes(10, moments("decoupled_lionw")) == 80
    assert checkpoint_bytes(10, 2, weights_only=True) == 40


def test_times_are_read_as_composer_reads_them():
    assert split_time("1000ba") == (1000, "ba") and split_time(2) == (2, "ep")


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30 * 10**9))
    folder = tmp_path / "not" / "yet"
    assert free_bytes(folder) == 30 * 10**9
    check_disk(folder, kept=2, size=13 * 10**9)
    check_disk(folder, kept=3, size=13 * 10**9, existing=26 * 10**9)
    told = "3 checkpoints of 13.0 GB need 39.0 GB in .*free are 30.0 GB.*save_interval"
    with pytest.raises(ValueError, match=told):
        check_disk(folder, kept=3, size=13 * 10**9)
