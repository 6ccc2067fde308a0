"""pass@k of programs that a model writes; they are run, each in a process of its own."""

import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Of a program, as in OpenAI's human-eval, with room for a start of Python.
SECONDS = 5.0
# So that a program that fills memory or disk harms itself only; in bytes.
MEMORY = 4 << 30
FILE_SIZE = 16 << 20
K = (1, 10)

# A program cannot end before its tests and look like a success: that has one of these statuses,
# drawn for each program, in place of 0.
_SUCCESS = range(64, 113)
_START = """import os, resource, sys, types
resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
program = open("program.py", encoding="utf-8").read()
sys.modules["program"] = module = types.ModuleType("program")  # dataclasses look for theirs
exec(compile(program, "program.py", "exec"), module.__dict__)
os._exit({success})
"""


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Chance that one of k programs passes that are drawn from those sampled.

    pass@k = 1 - C(n - c, k) / C(n, k), without bias: Chen et al. 2021 (arXiv 2107.03374), eq. 1.

    Args:
        samples: n, programs.
        passed: c, those that pass.
        k: programs drawn, at most n.

    Raises:
        ValueError: more are drawn than there are.
    """
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {passed} passed among {samples} samples: not defined")
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def run_program(program: str, seconds: float = SECONDS) -> bool:
    """Whether a Python program ends well, in a process with a folder of its own.

    It can read what you can read and use the network: limits keep it from filling memory and disk
    and from running for ever, and nothing keeps it from doing harm. Run it where that is no loss.

    Args:
        program: its text.
        seconds: after these it is killed, with what it has started in its own session.
    """
    success = secrets.choice(_SUCCESS)
    start = _START.format(memory=MEMORY, size=FILE_SIZE, success=success)
    with tempfile.TemporaryDirectory(prefix="generated-code-") as folder:
        Path(folder, "program.py").write_text(program, encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", start],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(seconds) == success
        except subprocess.TimeoutExpired:
            return False
        finally:
            _kill_group(process)


def _kill_group(process: subprocess.Popen) -> None:
    """Also what the program has left behind, but for what began a session of its own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def score_samples(document: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict:
    """pass@k of one problem of HumanEval, as the harness asks for it (`process_results`).

    Args:
        document: the problem: prompt, test, entry_point.
        results: the continuations of its prompt, as the only item.
    """
    from joblib import cpu_count  # knows a container's limits: more at once run out of time

    (continuations,) = results
    tests = f"\n{document['test']}\ncheck({document['entry_point']})\n"
    programs = [document["prompt"] + text + tests for text in continuations]
    with ThreadPoolExecutor(cpu_count()) as pool:
        passed = sum(pool.map(run_program, programs))
    return {f"pass@{k}": pass_at_k(len(programs), passed, k) for k in K}
