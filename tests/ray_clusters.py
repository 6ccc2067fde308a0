"""Drivers, nodes and workers of Ray clusters on this machine, for the tests of the engine."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from prepared import small_options, tokenizer_folder

from apex_composer.data_prep import prepare

ROOT = Path(__file__).parents[1]
# Without loading transformers each time.
PROGRAM = """
import os, shutil, signal, sys, threading
from apex_composer.data_prep import preparation, prepare, read_manifest
from apex_composer.data_prep.engines import ray_cluster
from apex_composer.data_prep.tokens.tokenizer import TokenizerFacts
from dataclasses import fields
from itertools import count
from pathlib import Path
from prepared import small_options

corpus, out, local, address, goal, name = sys.argv[1:]
receive, results = ray_cluster._receive, count()

def load(name, folder):
    shutil.copytree(Path(local, "tokenizer"), folder, dirs_exist_ok=True)
    known = read_manifest(Path(local))["tokenizer"]
    return TokenizerFacts(**{field.name: known[field.name] for field in fields(TokenizerFacts)})

def counted(*arguments):
    if next(results) == int(goal):
        threading.Timer(0.05, os.kill, (os.getpid(), getattr(signal, name))).start()
    return receive(*arguments)

preparation.load_tokenizer, ray_cluster._receive = load, counted
given = {"tokenizer": "", "options": small_options(), "workers": 2}
prepare(corpus, out, engine="ray", address=address or None, **given)
"""


def start(job, out, address="", goal=-1, name=""):
    """A driver in a process of its own, which gets a signal at one of its results."""
    paths = [str(ROOT), str(ROOT / "tests")]
    command = [sys.executable, "-c", PROGRAM, str(job[0]), str(out), str(job[0].with_name("local"))]
    return subprocess.Popen(
        [*command, address, str(goal), name],
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


def wait_for(condition, seconds=200):
    """Wait until something is true; it must become so, also on a busy machine."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def processes_of_ray(known=(), word=""):
    """Numbers of this machine's Ray processes that have a word in their command, but the known."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes()
            if (words.startswith(b"ray::") or b"/ray/" in words) and word.encode() in words:
                found.add(int(path.parent.name))
    return found - set(known)


def add_node(cluster, path=""):
    """Add a node of one core, whose workers find what the tests share."""
    paths = os.pathsep.join([str(ROOT / "tests"), str(path)])
    return cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": paths})


def busy_workers(nodes):
    """Numbers of the processes that have a task."""
    raylets = {node.all_processes["raylet"][0].process.pid for node in nodes}
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in raylets and path.read_bytes().startswith(b"ray::run_attempt"):
                found.append(int(path.parent.name))
    return found


def prepare_on_ray(job, out, **settings):
    given = {"tokenizer": tokenizer_folder(), "options": small_options(), "engine": "ray"}
    return prepare(job[0], out, **given | settings)


def free_ports(count):
    """Numbers that no other process listens at."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


def kill_processes(numbers):
    """Kill those that are still there."""
    for number in numbers:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
