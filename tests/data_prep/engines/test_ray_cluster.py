"""Clusters of two and three nodes on this machine: what dies or comes changes no byte."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import cluster_tasks
import pytest
from corpus import write_corpus
from prepared import file_hashes, run, small_options, tokenizer_folder

from apex_composer.data_prep import prepare, read_manifest, verify
from apex_composer.data_prep.choose.job_plan import read_plan
from apex_composer.data_prep.engines import ray_cluster
from apex_composer.data_prep.engines.engine import Engine
from apex_composer.data_prep.errors import SettingsError, SourceError, WorkerDiedError
from apex_composer.data_prep.pieces import _describe, _piece_task
from apex_composer.data_prep.tokens.piece import PieceReport

pytestmark = pytest.mark.ray
SEED = 20_250_524
ROOT = Path(__file__).parents[3]
# Without loading transformers each time.
PROGRAM = """
import shutil, sys
from apex_composer.data_prep import preparation, prepare, read_manifest
from apex_composer.data_prep.tokens.tokenizer import TokenizerFacts
from dataclasses import fields
from pathlib import Path
from prepared import small_options

corpus, out, local, *address = sys.argv[1:]

def load(name, folder):
    shutil.copytree(Path(local, "tokenizer"), folder, dirs_exist_ok=True)
    known = read_manifest(Path(local))["tokenizer"]
    return TokenizerFacts(**{field.name: known[field.name] for field in fields(TokenizerFacts)})

preparation.load_tokenizer = load
address = address[0] if address else None
given = {"tokenizer": "", "options": small_options(), "workers": 2}
prepare(corpus, out, engine="ray", address=address, **given)
"""


def start(job, out, *address):
    """A driver in a process of its own."""
    paths = [str(ROOT), str(ROOT / "tests")]
    command = [sys.executable, "-c", PROGRAM, str(job[0]), str(out), str(job[0].with_name("local"))]
    return subprocess.Popen(
        [*command, *address],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stderr=subprocess.PIPE,
        text=True,
    )


def done_files(out):
    """Names and times of the files of finished pieces and shards."""
    times = {}
    for folder, _, names in os.walk(out):
        for path in (Path(folder, name) for name in names):
            is_output = "/pieces/" in str(path) or path.name.startswith("shard.")
            if is_output and ".partial" not in str(path):
                with suppress(FileNotFoundError):
                    times[path] = path.stat().st_mtime_ns
    return times


def wait_for(condition, seconds=60):
    """Wait until something is true; it must become so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def processes_of_ray(known=()):
    """Numbers of this machine's Ray processes, but for those that are known."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes()
            if words.startswith(b"ray::") or b"/ray/" in words:
                found.add(int(path.parent.name))
    return found - set(known)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A corpus, and what the local engine writes of it."""
    folder = tmp_path_factory.mktemp("job")
    corpus = write_corpus(folder / "corpus", documents=900)
    run(corpus, folder / "local", workers=2)
    return corpus, file_hashes(folder / "local")


def test_ctrl_c_ends_a_local_ray_and_all_of_its_processes(job, tmp_path):
    before, out = processes_of_ray(), tmp_path / "out"
    command = [sys.executable, "-m", "apex_composer.data_prep", "prep", str(job[0])]
    command += ["--out", str(out), "--tokenizer", str(tokenizer_folder()), "--piece-size", "4096"]
    command += ["--seq-len", "32", "--val-tokens", "640", "--engine", "ray", "--workers", "2"]
    driver = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    wait_for(lambda: len(done_files(out)) > 12)
    assert processes_of_ray(before)
    started = time.monotonic()
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: to all processes
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 128 + signal.SIGINT, errors
    assert "interrupted. Give the same command again" in errors and "Traceback" not in errors
    wait_for(lambda: not processes_of_ray(before))
    assert time.monotonic() - started < 10  # beside other tests
    assert not list(out.rglob("driver*"))


def add_node(cluster, path=""):
    """Add a node of one core, whose workers find what the tests share."""
    paths = os.pathsep.join([str(ROOT / "tests"), str(path)])
    return cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": paths})


@pytest.fixture(scope="module")
def cluster():
    """A head without cores, to which this process is connected, and two nodes of one core each."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ.update(ray_cluster.QUIET)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        add_node(cluster)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def prepare_on_ray(job, out, **settings):
    given = {"tokenizer": tokenizer_folder(), "options": small_options(), "engine": "ray"}
    return prepare(job[0], out, **given | settings)


@contextmanager
def preparing(job, out, **settings):
    """Prepare while the block is at work; nodes can be added in the main thread only."""
    with ThreadPoolExecutor(1) as pool:
        preparation = pool.submit(prepare_on_ray, job, out, **settings)
        try:
            yield
        finally:
            preparation.result()


def test_nodes_come_and_go(job, cluster, tmp_path):
    first, out = add_node(cluster), tmp_path / "out"
    with preparing(job, out, keep_work=True):
        wait_for(lambda: len(done_files(out)) > 100)
        cluster.remove_node(first, allow_graceful=False)
        finished = done_files(out)
        second = add_node(cluster)
        assert read_manifest(out) is None  # it is still at work
    assert file_hashes(out) == job[1]
    after = done_files(out)
    assert len(finished) > 100 and all(after[path] == finished[path] for path in finished)
    assert not list(out.rglob("*.partial*"))
    assert verify(out, engine="ray") == []
    cluster.remove_node(second, allow_graceful=False)


def busy_workers(nodes):
    """Numbers of the processes that have a task."""
    raylets = {node.all_processes["raylet"][0].process.pid for node in nodes}
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            name = path.read_bytes()
            parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
            others = (b"ray::IDLE", b"ray::Reports", b"ray::Dashboard", b"ray::RuntimeEnv")
            if parent in raylets and name.startswith(b"ray::") and not name.startswith(others):
                found.append(int(path.parent.name))
    return found


def test_twenty_killed_workers_change_nothing(job, cluster, tmp_path):
    out, moments, kills = tmp_path / "out", random.Random(SEED), 0
    with preparing(job, out):
        while kills < 20:
            goal = len(done_files(out)) + moments.randint(1, 8)
            wait_for(lambda goal=goal: len(done_files(out)) >= goal)
            with suppress(IndexError, ProcessLookupError):  # it has ended just now
                os.kill(moments.choice(busy_workers(cluster.worker_nodes)), signal.SIGKILL)
                kills += 1
        assert read_manifest(out) is None  # it is still at work
    assert file_hashes(out) == job[1]
    assert not list(out.rglob("*partial*")) and not (out / ".work").exists()


def test_a_driver_that_is_killed_twice_goes_on(job, cluster, tmp_path):
    out, redone, ends, there = tmp_path / "out", 0, [], [cluster.address]
    # A killed local Ray's workers go on for up to 24 s, beside those of the next driver.
    for goal, name, address in (
        (60, "SIGKILL", []), (140, "SIGKILL", there), (220, "SIGINT", there), (None, None, there)
    ):  # fmt: skip
        before = done_files(out)
        driver = start(job, out, *address)
        if goal is not None:
            while len(done_files(out)) <= goal and driver.poll() is None:
                time.sleep(0.01)
            driver.send_signal(getattr(signal, name))
        _, errors = driver.communicate()
        ends.append(driver.returncode)
        wait_for(lambda: not busy_workers(cluster.worker_nodes), 10)
        after = done_files(out)
        redone += sum(after[path] != before[path] for path in before.keys() & after.keys())
    assert (ends, redone) == ([-signal.SIGKILL, -signal.SIGKILL, -signal.SIGINT, 0], 0), errors
    assert file_hashes(out) == job[1]
    assert not list(out.rglob("*partial*"))


@pytest.fixture
def on_ray(cluster, tmp_path):
    """Run tasks; their results by name, and the sum of documents reported."""

    def call(work, tasks):
        news = []
        (tmp_path / ".work").mkdir(exist_ok=True)
        with Engine("ray").opened(tmp_path) as map_tasks:
            results = {t["name"]: r for t, r in map_tasks(work, tasks, news.append, 99)}
        return results, [one["documents"] for one in news]

    return call


def test_reports_of_an_attempt_that_died_are_not_counted(on_ray, tmp_path):
    task = {"name": "a", "number": 3, "marker": str(tmp_path / "marker"), "seconds": 1.5}
    results, documents = on_ray(cluster_tasks.die_at_first, [task])
    assert results == {"a": 6} and documents == [6, -6, 6]


def test_a_task_that_kills_every_worker_is_named(on_ray, tmp_path):
    told = r"5 workers of the Ray cluster died at some/file(.|\n)*Give the same command again"
    with pytest.raises(WorkerDiedError, match=told):
        on_ray(cluster_tasks.die, [{"name": "some/file"}])
    assert list((tmp_path / ".work").iterdir()) == []


def test_tasks_are_drawn_as_cores_get_free(on_ray):
    drawn, most = [], []

    def tasks():
        for number in range(30):
            drawn.append(number)
            yield {"name": str(number), "number": number, "seconds": 0.02}

    with pytest.MonkeyPatch.context() as patch:
        receive = ray_cluster._receive
        results = []

        def counted(*arguments):
            most.append(len(drawn) - len(results))
            results.append(receive(*arguments))
            return results[-1]

        patch.setattr(ray_cluster, "_receive", counted)
        found, documents = on_ray(cluster_tasks.double, tasks())
    assert found == {str(number): 2 * number for number in range(30)}
    assert sum(documents) == sum(found.values()) and max(most) <= 2 + ray_cluster.WAITING


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        ("SourceError", ("a.gz:3: cut short",)),
        ("DiskFullError", (28, "the disk is full")),
        ("ShortfallError", ("too little", ["book"])),
        ("Rejected", ("blank text", "book")),
    ],
)
def test_an_error_is_that_of_the_local_engine(on_ray, error, arguments):
    task = {"name": "a", "error": error, "arguments": arguments}
    with pytest.raises((OSError, ValueError)) as local:
        cluster_tasks.fail(task, None)
    with pytest.raises(local.type) as caught:
        on_ray(cluster_tasks.fail, [task])
    assert type(caught.value) is local.type and str(caught.value) == str(local.value)
    assert vars(caught.value) == vars(local.value) and caught.value.args == local.value.args


def test_a_damaged_archive_is_an_error_that_names_the_line(cluster, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    archive = corpus / "github" / "b.jsonl.gz"
    archive.write_bytes(archive.read_bytes()[:-20])
    # Without budgets nothing is sampled, so that a worker finds it.
    options = small_options(train_tokens=None, cpt_tokens=None)
    with pytest.raises(SourceError, match=r"b\.jsonl\.gz"):
        prepare_on_ray((corpus, None), tmp_path / "out", options=options)


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


BLIND = """
import builtins, io, os

def blind(function):
    def see(path, *arguments, **names):
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith({hidden!r}):
            raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
        return function(path, *arguments, **names)
    return see

for module, name in ((builtins, "open"), (io, "open"), (os, "stat"), (os, "scandir")):
    setattr(module, name, blind(getattr(module, name)))
"""


def test_a_node_that_does_not_see_a_folder_is_named(job, cluster, tmp_path):
    hidden = tmp_path / "hidden"
    (tmp_path / "sitecustomize.py").write_text(BLIND.format(hidden=str(hidden)))
    corpus = write_corpus(hidden / "corpus")
    blind = add_node(cluster, path=tmp_path)
    with pytest.raises(SettingsError, match=r"The Ray node .* does not see the output folder"):
        prepare_on_ray(job, hidden / "out")
    told = r"The Ray node .* does not see .*hidden/corpus.* of the input"
    with pytest.raises(SettingsError, match=told):
        prepare_on_ray((corpus, None), tmp_path / "out")
    cluster.remove_node(blind, allow_graceful=False)


def test_a_node_with_other_versions_is_refused(job, cluster, tmp_path, monkeypatch):
    other = (("tokenizers", "0.0.1"),)
    monkeypatch.setattr(ray_cluster, "own_versions", lambda: other)
    told = r"The Ray node .* has tokenizers .* gives the tasks has 0\.0\.1"
    with pytest.raises(SettingsError, match=told):
        prepare_on_ray(job, tmp_path / "out")
