import errno
import json
import math
import os
import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_composer.callbacks import metrics_file
from apex_composer.callbacks.metrics_file import (
    LOSS,
    MetricsFile,
    encode,
    read_lines,
    read_number,
    thin,
)


def start(batch):
    return {"kind": "start", "batch": batch}


def of_batch(batch, names=3):
    clock = {"tokens": 64 * batch, "samples": 4 * batch, "seconds": 0.1 * batch, "took": 0.1}
    metrics = {f"throughput/number_{name}": batch + name / 7 for name in range(names)}
    during = {LOSS: 3.0 + 1 / batch}
    return {"kind": "batch", "batch": batch, **clock, "trained": 64, "during": during} | {
        "metrics": metrics
    }


def evaluation(batch):
    return {"kind": "evaluation", "batch": batch, "metrics": {"metrics/eval/cc": 2.0}}


def write(path, lines, limit=10**9):
    file = MetricsFile(path, limit)
    for line in lines:
        file.append(line)
    file.close()


@given(cut=st.integers(0, 400))
def test_a_kill_at_any_byte_costs_the_line_that_was_being_written(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    lines = [start(0), *(evaluation(batch) for batch in range(1, 7))]
    whole = b"".join(map(encode, lines))
    path.write_bytes(whole[:cut])
    kept = whole[:cut].count(b"\n")
    assert read_lines(path) == (lines[:kept], 0)
    write(path, [start(9)])  # the next process
    assert read_lines(path) == ([*lines[:kept], start(9)], 0)
    assert path.read_bytes() == whole[: whole[:cut].rfind(b"\n") + 1] + encode(start(9))


def test_a_kill_while_the_file_was_thinned_leaves_nothing_behind(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [start(0)])
    (tmp_path / "metrics.jsonl.partial-0a1b").write_bytes(b"half")
    write(path, [start(1)])
    assert [own.name for own in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert read_lines(path)[0] == [start(0), start(1)]


def test_what_came_after_a_resumed_checkpoint_is_superseded(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [start(0), of_batch(1), of_batch(2), evaluation(2), of_batch(3), evaluation(3)]
    write(path, [*lines, start(2), of_batch(3)])
    assert read_lines(path)[0] == [*lines[:4], start(2), of_batch(3)]
    write(path, [start(0), of_batch(1)])
    assert read_lines(path)[0] == [start(0), of_batch(1)]


def test_damaged_and_foreign_lines_are_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(encode(start(0)) + b'\0\0\0\n{"loss": 1}\n[]\n' + encode(evaluation(1)))
    assert read_lines(path) == ([start(0), evaluation(1)], 3)


def test_a_long_run_stays_below_the_limit_and_keeps_what_matters(tmp_path):
    path, limit, size = tmp_path / "metrics.jsonl", 200_000, 0
    file = MetricsFile(path, limit)
    file.append(start(0))
    for batch in range(1, 3001):
        file.append(of_batch(batch, names=30))
        size += len(encode(of_batch(batch, names=30)))
        if batch % 300 == 0:
            file.append(evaluation(batch))
        if batch % 100 == 0:
            assert path.stat().st_size <= limit + 3000
    file.close()
    assert size > 10 * limit
    lines, damaged = read_lines(path)
    own = [line for line in lines if line["kind"] == "batch"]
    assert damaged == 0 and len([1 for line in lines if line["kind"] == "evaluation"]) == 10
    assert own[0] == of_batch(1, names=30) and own[-1] == of_batch(3000, names=30)
    batches = [line["batch"] for line in own]
    assert batches == sorted(set(batches)) and len(batches) > 150
    assert max(b - a for a, b in zip(batches, batches[1:], strict=False)) < 60
    assert all(line["during"][LOSS] == of_batch(line["batch"])["during"][LOSS] for line in own)


def test_a_number_that_is_logged_seldom_is_not_thinned():
    lines = [of_batch(batch, names=20) for batch in range(1, 1001)]
    for line in lines[::100]:
        line["metrics"]["apex/overlap"] = 0.5
    thinned = thin(lines, 100_000)
    assert len(b"".join(map(encode, thinned))) <= 100_000
    found = [line["batch"] for line in thinned if "apex/overlap" in line["metrics"]]
    assert found == [line["batch"] for line in lines[::100]]


def test_a_full_disk_is_said_and_the_training_goes_on(tmp_path, monkeypatch, caplog):
    """Batches are counted, evaluations are kept until there is room; a half line is taken back."""
    path, full, really = tmp_path / "metrics.jsonl", [], os.write

    def write_some(file, text):
        if not full:
            return really(file, text)
        if full.pop() == "half":
            return really(file, text[: len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics_file.os, "write", write_some)
    file = MetricsFile(path, 10**9)
    file.append(start(0))
    full += ["error", "half"]
    file.append(of_batch(1))  # half of it
    file.append(of_batch(2))  # the retry fails, so it is not tried
    full += ["error"]
    file.append(evaluation(2))
    file.append(of_batch(3))
    file.close()
    lost = {"kind": "lost", "batch": 2, "first": 1, "lines": 2}
    assert read_lines(path) == ([start(0), lost, evaluation(2), of_batch(3)], 0)
    assert [r.message for r in caplog.records if "cannot write" in r.message] and len(
        [r for r in caplog.records if "cannot write" in r.message]
    ) == 1


def test_lines_without_room_until_the_end_are_said(tmp_path, monkeypatch, caplog):
    file = MetricsFile(tmp_path / "metrics.jsonl", 10**9)

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as changed:
        changed.setattr(metrics_file.os, "write", refuse)
        file.append(evaluation(1))
        file.close()
    assert "lacks lines" in caplog.text


def refuse_constants(text):
    raise AssertionError(f"{text} is no JSON")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.5, 2])
def test_numbers_that_json_does_not_know_come_back(tmp_path, value):
    path = tmp_path / "metrics.jsonl"
    settings = {"kind": "settings", "batch": 0, "settings": {"betas": (0.9, value), "größe": "ß"}}
    write(path, [{**evaluation(1), "metrics": {"a": value, "b": "text"}}, settings])
    line, kept = (json.loads(t, parse_constant=refuse_constants) for t in path.open())
    assert repr(read_number(line["metrics"]["a"])) == repr(float(value))
    assert read_number(line["metrics"]["b"]) is None
    assert (
        read_number(kept["settings"]["betas"][1]) is not None and kept["settings"]["größe"] == "ß"
    )


def test_a_real_limit_of_the_operating_system_costs_batches_and_no_more(tmp_path, caplog):
    """As a full disk does, the kernel takes a part of a line, and then none."""
    path, limits = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    file = MetricsFile(path, 10**9)
    file.append(start(0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        for batch in range(1, 6):
            file.append(of_batch(batch))
        file.append(evaluation(5))
        assert path.stat().st_size <= 500
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    file.append(of_batch(6))
    file.close()
    lines, damaged = read_lines(path)
    assert damaged == 0 and lines[-2:] == [evaluation(5), of_batch(6)]
    (lost,) = [line for line in lines if line["kind"] == "lost"]
    assert lost["batch"] == 5 and lost["lines"] == 5 - len(lines[1:-3])
    assert caplog.text.count("cannot write") == 1


@pytest.mark.parametrize("when", ["read", "write", "open"])
def test_a_file_that_cannot_be_thinned_does_not_end_the_training(
    tmp_path, monkeypatch, caplog, when
):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 1000)
    names = {"read": "read_lines", "write": "new_file", "open": "os.open"}

    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as changed:
        if when == "open":
            changed.setattr(metrics_file.os, "open", refuse)
            changed.setattr(metrics_file, "new_file", lambda path: (tmp_path / "x").open("wb"))
        else:
            changed.setattr(metrics_file, names[when], refuse)
        for batch in range(1, 9):
            file.append(of_batch(batch))
    file.close()
    assert "cannot be made smaller" in caplog.text
    assert [line["batch"] for line in read_lines(path)[0]] == [*range(1, 9)]


def test_a_folder_that_is_none_is_told_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        MetricsFile(tmp_path / "file" / "metrics.jsonl", 1)
