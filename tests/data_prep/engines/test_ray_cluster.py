"""Clusters of two and three nodes on this machine: what dies or comes changes no byte."""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count

import cluster_tasks
import pytest
from chats import instruct, tulu_line, write_records
from prepared import file_hashes, small_options, tokenizer_folder
from ray_clusters import (
    ROOT,
    add_node,
    busy_workers,
    done_files,
    free_ports,
    kill_processes,
    prepare_on_ray,
    processes_of_ray,
    start,
    wait_for,
)

from apex_composer.data_prep import merge, prepare, read_manifest, verify, verify_instruct
from apex_composer.data_prep.choose.job_plan import read_plan
from apex_composer.data_prep.engines import ray_cluster
from apex_composer.data_prep.pieces import _describe, _piece_task
from apex_composer.data_prep.tokens.piece import PieceReport

pytestmark = pytest.mark.ray


def test_ctrl_c_ends_a_local_ray_and_all_of_its_processes(job, tmp_path):
    before, out = processes_of_ray(), tmp_path / "out"
    command = [sys.executable, "-m", "apex_composer.data_prep", "prep", str(job[0])]
    command += ["--out", str(out), "--tokenizer", str(tokenizer_folder()), "--piece-size", "4096"]
    command += ["--seq-len", "32", "--val-tokens", "640", "--engine", "ray", "--workers", "2"]
    driver = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    wait_for(lambda: len(done_files(out)) > 12 or driver.poll() is not None)
    assert processes_of_ray(before)
    started = time.monotonic()
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: to all processes
    _, errors = driver.communicate(timeout=200)
    assert driver.returncode == 128 + signal.SIGINT, errors
    assert "interrupted. Give the same command again" in errors and "Traceback" not in errors
    wait_for(lambda: not processes_of_ray(before))
    assert time.monotonic() - started < 40  # beside other tests
    assert not list(out.rglob("driver*"))


@pytest.fixture
def at_result(monkeypatch):
    """Call something at every result of this process's driver, which waits for it meanwhile."""
    receive = ray_cluster._receive

    def hear(call):
        numbers = count()

        def counted(*arguments):
            call(next(numbers))
            return receive(*arguments)

        monkeypatch.setattr(ray_cluster, "_receive", counted)

    return hear


def test_nodes_come_and_go(job, cluster, tmp_path, at_result):
    first, out = add_node(cluster), tmp_path / "out"
    begun, changed = threading.Event(), threading.Event()
    # Some results come in between; the rest waits, so that the job cannot end before.
    at_result(lambda number: (begun.set, lambda: number < 60 or changed.wait())[number > 25]())
    # Nodes can be added in the main thread only.
    with ThreadPoolExecutor(1) as pool:
        preparation = pool.submit(prepare_on_ray, job, out)
        wait_for(lambda: begun.is_set() or preparation.done())
        cluster.remove_node(first, allow_graceful=False)
        finished = done_files(out)
        second = add_node(cluster)
        again = done_files(out)
        changed.set()
        preparation.result()
    assert finished and all(again[path] == finished[path] for path in finished)
    assert file_hashes(out) == job[1]
    assert not list(out.rglob("*.partial*"))
    assert verify(out, engine="ray") == []
    cluster.remove_node(second, allow_graceful=False)


def test_twenty_killed_workers_change_nothing(job, cluster, tmp_path, monkeypatch):
    out, deaths = tmp_path / "out", tmp_path / "deaths"
    deaths.mkdir()
    monkeypatch.setattr(ray_cluster, "run_attempt", cluster_tasks.run_and_die)
    prepare_on_ray(job, out)
    assert len(list(deaths.iterdir())) >= cluster_tasks.DEATHS == 20
    assert file_hashes(out) == job[1]
    assert not list(out.rglob("*partial*")) and not (out / ".work").exists()


def test_a_driver_that_is_killed_twice_goes_on(job, cluster, tmp_path):
    out, redone, ends, there = tmp_path / "out", 0, [], cluster.address
    # A killed local Ray's workers go on for up to 24 s, beside those of the next driver.
    for address, goal, name in (
        ("", 15, "SIGKILL"), (there, 20, "SIGKILL"), (there, 20, "SIGINT"), (there, -1, "")
    ):  # fmt: skip
        before = done_files(out)
        driver = start(job, out, address, goal, name)
        _, errors = driver.communicate(timeout=200)
        ends.append(driver.returncode)
        wait_for(lambda: not busy_workers(cluster.worker_nodes))
        after = done_files(out)
        redone += sum(after[path] != before[path] for path in before.keys() & after.keys())
    assert (ends, redone) == ([-signal.SIGKILL, -signal.SIGKILL, -signal.SIGINT, 0], 0), errors
    assert file_hashes(out) == job[1]
    assert not list(out.rglob("*partial*"))


def test_the_parts_of_an_array_job_and_their_end(job, cluster, tmp_path):
    for part in ((1, 2), (2, 2)):
        assert prepare_on_ray(job, tmp_path / "out", shard=part) is None
    merge(tmp_path / "out", engine="ray")
    assert file_hashes(tmp_path / "out") == job[1]


def test_instruction_data(cluster, tmp_path):
    records = write_records(tmp_path / "in.jsonl", [tulu_line(number) for number in range(60)])
    for engine in ("local", "ray"):
        instruct(records, tmp_path / engine, engine=engine)
    assert file_hashes(tmp_path / "local") == file_hashes(tmp_path / "ray")
    assert verify_instruct(tmp_path / "ray", engine="ray") == []
    with (tmp_path / "ray" / "train.jsonl").open("ab") as file:
        file.write(b"\n")
    faults = verify_instruct(tmp_path / "ray", engine="ray")
    assert faults == ["train.jsonl: its bytes have changed (sha256)"]


def test_tasks_that_nobody_waits_for_end(on_ray, cluster, tmp_path):
    marker = tmp_path / "marker"

    def interrupted():
        yield {"name": "a", "marker": str(marker)}
        wait_for(marker.exists)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        on_ray(cluster_tasks.go_on, interrupted())
    assert not list(tmp_path.rglob("driver*"))
    wait_for(lambda: not busy_workers(cluster.worker_nodes), seconds=40)  # of the task's 200


def test_a_piece_whose_worker_died_thereafter_is_not_made_again(job, on_ray, tmp_path):
    arguments = {"tokenizer": tokenizer_folder(), "options": small_options(), "workers": 1}
    prepare(job[0], tmp_path, keep_work=True, **arguments)
    piece = _piece_task(tmp_path, read_plan(tmp_path), 0)
    folder = tmp_path / ".work" / "pieces" / "000000"
    expected = PieceReport(**json.loads((folder / "report.json").read_text()))
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    work = partial(cluster_tasks.die_when_done, done=PieceReport)
    results, documents = on_ray(work, [_describe(piece)])
    assert results == {piece.name: expected} and (tmp_path / "died").exists()


@pytest.fixture
def head(monkeypatch):
    """A cluster as `ray start` makes it, and the addresses of itself and of its client server."""
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    for name, value in (settings | ray_cluster.QUIET).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "3")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    port, client_port = free_ports(2)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--num-cpus=2"]
    command += [f"--port={port}", f"--ray-client-server-port={client_port}"]
    subprocess.run([*command, "--include-dashboard=false"], check=True, capture_output=True)
    kill = partial(kill_processes, processes_of_ray(word=str(port)))
    yield f"127.0.0.1:{port}", f"ray://127.0.0.1:{client_port}", kill
    kill()
    wait_for(lambda: not processes_of_ray(word=str(port)))


def test_a_client_of_a_cluster_and_a_head_that_dies(job, head, tmp_path):
    address, client_address, kill = head
    # Ray's client server looks for the process that it has started before it is there, or when it
    # has ended already: both are failures of its own.
    for _ in range(3):
        driver = start(job, tmp_path / "client", client_address)
        _, errors = driver.communicate(timeout=200)
        if not re.search("Initialization failure|Starting Ray client server failed", errors):
            break
    assert driver.returncode == 0, errors
    assert file_hashes(tmp_path / "client") == job[1]
    driver = start(job, tmp_path / "out", address)
    wait_for(lambda: len(done_files(tmp_path / "out")) > 12 or driver.poll() is not None)
    kill()
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 1 and "GCS" in errors
    assert len(done_files(tmp_path / "out")) > 12 and read_manifest(tmp_path / "out") is None
