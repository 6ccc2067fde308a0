"""Kills at any moment, Ctrl-C, dying workers, a full disk: what is left is never half-written."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from corpus import write_corpus
from prepared import file_hashes, small_options, tokenizer_folder

from apex_composer.data_prep import prepare, verify

SEED = 20_250_524
# Files that a run may finish before it is killed: the job has about 200.
MOST_FILES = 18
# A process that prepares without reading the command line or loading transformers each time.
PROGRAM = """
import hashlib
import sys
from pathlib import Path
from apex_composer.data_prep import preparation, prepare
from apex_composer.data_prep.tokens.tokenizer import TokenizerFacts
from prepared import small_options

tokenizer = Path(sys.argv[3])

def load(name, folder):
    for path in tokenizer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    digest = hashlib.sha256(b"").hexdigest()
    return TokenizerFacts(name="test", sha256=digest, vocabulary_size=320, bos=0, eos=1)

if __name__ == "__main__":
    preparation.load_tokenizer = load
    prepare(
        sys.argv[1], sys.argv[2], tokenizer=tokenizer, options=small_options(), workers=2
    )
    print("done")
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A script, its corpus, and what it writes when nothing happens to it."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "program.py").write_text(PROGRAM)
    write_corpus(folder / "corpus", documents=200)
    assert start(folder, folder / "whole").wait() == 0
    return folder, file_hashes(folder / "whole")


def start(folder, out):
    command = [sys.executable, str(folder / "program.py")]
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    return subprocess.Popen(
        [*command, str(folder / "corpus"), str(out), str(tokenizer_folder())],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def written_files(out):
    """Names and times of the finished pieces' and shards' files."""
    times = {}
    for folder, _, names in os.walk(out):  # unlike glob, it bears folders that are being removed
        for path in (Path(folder, name) for name in names):
            if "/pieces/" in str(path) or path.name.startswith("shard."):
                with suppress(FileNotFoundError):
                    times[path] = path.stat().st_mtime_ns
    return {path: time for path, time in times.items() if ".partial" not in str(path)}


@pytest.mark.parametrize("wanted", [6, pytest.param(20, marks=pytest.mark.long)])
def test_kills_end_in_the_same_bytes_and_redo_nothing(job, tmp_path, wanted):
    folder, expected = job
    out, moments = tmp_path / "out", random.Random(SEED + wanted)
    kills = redone = 0
    while kills < wanted:
        before = written_files(out)
        process = start(folder, out)
        # Moments of work, not of the clock: every run gets a little further, whatever the machine.
        goal, delay = len(before) + moments.randint(0, MOST_FILES), moments.uniform(0, 0.02)
        while process.poll() is None and len(written_files(out)) < goal:
            time.sleep(0.002)
        time.sleep(delay)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        after = written_files(out)
        redone += sum(after[path] != before[path] for path in before.keys() & after.keys())
        if process.returncode == 0:  # finished between two kills: once more from the start
            assert file_hashes(out) == expected
            out = tmp_path / f"after-{kills}-kills-{time.monotonic_ns()}"
    process = start(folder, out)
    assert process.wait() == 0
    assert file_hashes(out) == expected
    assert redone == 0
    assert not list(out.glob("**/*partial*")) and not (out / ".work").exists()


def interrupt(corpus, out, workers, delay):
    """Press Ctrl-C some seconds after a first piece is done; the seconds that the end took."""
    command = [sys.executable, "-m", "apex_composer.data_prep", "prep", str(corpus)]
    command += ["--out", str(out), "--tokenizer", str(tokenizer_folder())]
    command += ["--seq-len", "32", "--val-tokens", "640", "--proportions", "equal"]
    command += ["--piece-size", "20000", "--workers", str(workers)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        start_new_session=True,
    )  # fmt: skip
    pieces = out / ".work" / "pieces"
    while not list(pieces.glob("[0-9]*")) and process.poll() is None:
        time.sleep(0.02)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
    started = time.monotonic()
    _, errors = process.communicate(timeout=30)
    seconds = time.monotonic() - started
    assert process.returncode == 130
    assert "interrupted. Give the same command again" in errors and "Traceback" not in errors
    assert wait_for_end(process.pid)
    return seconds


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_with_a_line_and_leaves_no_process(tmp_path, workers):
    corpus = write_corpus(tmp_path / "corpus", documents=4000)
    assert interrupt(corpus, tmp_path / "out", workers, 0) < 5  # beside other tests


@pytest.mark.long
def test_ctrl_c_ends_in_a_second_at_twenty_random_moments(tmp_path):
    corpus, moments = write_corpus(tmp_path / "corpus", documents=16000), random.Random(SEED)
    for trial in range(20):
        out = tmp_path / f"out-{trial}"
        assert interrupt(corpus, out, moments.choice([1, 2]), moments.uniform(0, 1)) < 1


def wait_for_end(group):
    """Whether no process of a group is left within some seconds."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_disk_that_fills_up_in_a_worker_can_be_continued(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=80)
    options = small_options(piece_bytes=1 << 20)
    arguments = {"tokenizer": tokenizer_folder(), "options": options, "workers": 1}
    expected = prepare(corpus, tmp_path / "whole", **arguments)
    # A limit on the size of files stands in for the disk: EFBIG and ENOSPC come the same way.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            prepare(corpus, tmp_path / "out", **arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert prepare(corpus, tmp_path / "out", **arguments)["shards"] == expected["shards"]
    assert verify(tmp_path / "out", workers=1) == []
