import itertools
import time
from fractions import Fraction

import pytest

from apex_composer.evaluate.generated_code import pass_at_k, run_program, score_samples


@pytest.mark.parametrize("samples", [1, 4, 7])
def test_pass_at_k_is_the_share_of_draws_with_a_program_that_passes(samples):
    for passed, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        draws = [*itertools.combinations(range(samples), k)]
        share = Fraction(sum(min(draw) < passed for draw in draws), len(draws))
        assert pass_at_k(samples, passed, k) == pytest.approx(float(share), abs=1e-15)


@pytest.mark.parametrize(("samples", "passed", "k"), [(3, 0, 4), (3, 4, 1), (3, -1, 1), (3, 1, 0)])
def test_pass_at_k_is_refused_where_it_is_not_defined(samples, passed, k):
    with pytest.raises(ValueError, match=f"pass@{k} of {passed} passed among {samples}"):
        pass_at_k(samples, passed, k)


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("x = 1", True),
        ("print('a' * 100000)", True),
        ("assert False", False),
        ("x = (", False),
        ("raise SystemExit(0)", False),  # ends before its tests, with the status of success
        ("import os; os._exit(0)", False),
        ("x = bytearray(8 << 30)", False),  # more memory than it may have
        ("open('big', 'wb').write(bytes(32 << 20))", False),
        ("import sys; assert sys.stdin.read() == ''", True),
        ("import io, sys; sys.stdout = io.StringIO()", True),
        ("import sys; sys.exit(1)", False),
        ("import threading, time; threading.Thread(target=time.sleep, args=(9,)).start()", True),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'", True),
    ],
)
def test_a_program_passes_when_it_reaches_its_end(program, passes):
    assert run_program(program) is passes


def test_a_program_is_killed_after_its_time_with_what_it_started(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(1.2); open({str(mark)!r}, 'w')"
    program = (
        "import subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "while True: pass"
    )
    start = time.monotonic()
    assert run_program(program, seconds=0.6) is False
    assert time.monotonic() - start < 1.2
    time.sleep(0.8)
    assert not mark.exists()


def test_samples_are_scored_by_the_tests_of_their_problem():
    problem = {
        "prompt": "def two():\n",
        "entry_point": "two",
        "test": "def check(candidate):\n    assert candidate() == 2\n",
    }
    samples = ["    return 2\n"] + ["    return 3\n"] * 9 + ["    return 1 + 1\n", "    retur"]
    scores = score_samples(problem, [samples])
    assert scores == {"pass@1": pytest.approx(2 / 12), "pass@10": pytest.approx(1 - 1 / 66)}
