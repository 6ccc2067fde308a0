"""Are the compiled kernels right? The kernel tests, on a GPU, with what each of them found.

They are the tests that the interpreter runs in small on the CPU: tests/triton_kernels, here at the
shapes of real models too. What is not an option of this script goes to pytest.

    python benchmarks/gpu/correctness.py --json correctness.json -k monarch

Exits with 1 where a test fails or finds no time to be run.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import checkout
from machine import choose_device, command_line, needs_pytest
from measuring import Deadline
from report import Report, print_table

checkout.activate()

FOLDER = checkout.ROOT / "tests" / "triton_kernels"
TESTS = [FOLDER / f"test_kernel_{name}.py" for name in ("swiglu", "norms", "monarch", "steps")]


class Recorder:
    """A plugin of pytest that writes a line for every test, and ends them when the time is over.

    Args:
        report: to which lines are added.
        deadline: after which no test begins.
    """

    def __init__(self, report: Report, deadline: Deadline):
        self._report, self._deadline = report, deadline
        self._messages: list[str] = []
        self._seconds = 0.0

    def pytest_runtest_setup(self, item) -> None:
        """Let a test fail for which no time is left."""
        import pytest

        if not self._deadline.allows():
            pytest.fail("not run: no time was left", pytrace=False)

    def pytest_collectreport(self, report) -> None:
        """A file that cannot be imported is a line."""
        if report.failed:
            self._report.add(report.nodeid, _message(report), "passes", False)

    def pytest_runtest_logreport(self, report) -> None:
        """A test has passed when it was set up, called and cleared away without an error."""
        self._seconds += report.duration
        if report.failed:
            self._messages.append(_message(report))
        if report.when != "teardown":
            return
        numbers: dict[str, Any] = dict(report.user_properties)
        text = "; ".join(self._messages) or f"passed in {self._seconds:.1f} s"
        if not self._messages and numbers:
            text += f", error {numbers['error']:.1e} (at most {numbers['bound']:.1e})"
        name = report.nodeid.removeprefix(f"{FOLDER.relative_to(checkout.ROOT).as_posix()}/")
        met = not self._messages
        self._report.add(name, text, "passes", met, duration=self._seconds, **numbers)
        self._messages, self._seconds = [], 0.0


def _message(report) -> str:
    """What an error says: of a failed comparison its two numbers."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:  # of a file that cannot be imported
        return str(report.longrepr).splitlines()[-1].removeprefix("E").strip()
    return " ".join(line.strip() for line in crash.message.splitlines()[:3])


def run(options: argparse.Namespace, arguments: Sequence[str]) -> Report:
    """All tests, each a line of the report.

    Args:
        options: those of the script.
        arguments: further ones of pytest.
    """
    import pytest

    report = Report("correctness", options.json)
    settings = ["--rootdir", str(checkout.ROOT), "-c", str(checkout.ROOT / "pyproject.toml")]
    status = pytest.main(
        [*settings, "-q", "-p", "no:cacheprovider", *map(str, TESTS), *arguments],
        plugins=[Recorder(report, Deadline(options.budget))],
    )
    report.facts["pytest_exit_status"] = int(status)
    report.complete = status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    report.save()
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Test, print, and exit with 1 if anything failed."""
    needs_pytest()
    options, rest = command_line(__doc__).parse_known_args(arguments)
    choose_device(options.device)
    report = run(options, rest)
    print_table(report.lines, "correctness")
    return int(not (report.complete and all(line["met"] for line in report.lines)))


if __name__ == "__main__":
    sys.exit(main())
