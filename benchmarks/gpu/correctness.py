"""Are the compiled kernels right? Every one against float64, twice, at the shapes of real models.

TF32 is allowed meanwhile, as Composer allows it for the whole process: ours must not care.

    python benchmarks/gpu/correctness.py --json correctness.json

Exits with 1 where anything differs by more than its bound, raises, or finds no time to be run.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import checkout
import torch
from checks import Check, Finding, poisoned_memory
from measuring import Deadline
from report import Report, failed, print_table

checkout.activate()

import check_activations  # noqa: E402
import check_monarch  # noqa: E402
import check_steps  # noqa: E402
from machine import choose_device, progress_bar, tf32_allowed  # noqa: E402


def all_checks(device: torch.device, *, small: bool) -> Iterator[tuple[Check, bool]]:
    """Every check, and whether it runs on poisoned memory (whole steps may not: it costs time)."""
    kernels = itertools.chain(
        check_activations.checks(device, small=small), check_monarch.checks(device, small=small)
    )
    for check in kernels:
        yield check, True
    for check in check_steps.checks(device, small=small):
        yield check, False


@tf32_allowed()
def run(
    device: torch.device,
    *,
    small: bool = False,
    budget: float | None = None,
    path: Path | None = None,
) -> Report:
    """All checks, each a line of the report.

    Args:
        device: of the kernels.
        small: tiny shapes, to try the script.
        budget: seconds after which no further check begins.
        path: of the JSON file.
    """
    report, deadline = Report("correctness", path), Deadline(budget)
    report.facts["allow_tf32"] = torch.backends.cuda.matmul.allow_tf32
    for check, poisoned in progress_bar(
        list(all_checks(device, small=small)), desc="checks", delay=5
    ):
        if not deadline.allows():
            report.add(check.what, "not run: no time was left", "within bounds", False)
            continue
        try:
            with poisoned_memory() if poisoned else nullcontext():
                findings = check.run()
        except Exception as error:  # one broken kernel must not hide what the others do
            text = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            report.add(check.what, text, "within bounds", False)
            continue
        _add(report, check.what, findings)
    report.finish()
    return report


def _add(report: Report, what: str, findings: list[Finding]) -> None:
    """A line: what is wrong, or else the largest error beside its bound."""
    wrong = [finding for finding in findings if not finding.holds]
    by_share = max(findings, key=lambda f: f.error / f.bound if f.bound else f.error)
    shown = wrong or [by_share]
    text = "; ".join(f"{f.what} {f.error:.1e} (at most {f.bound:.1e})" for f in shown[:3])
    numbers = [finding._asdict() for finding in findings]
    report.add(what, text, "within bounds", not wrong, findings=numbers)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="default cuda; cpu interprets the kernels")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--budget", type=float, help="seconds after which no check begins")
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print, and exit with 1 if anything failed."""
    options = parse(arguments)
    device = choose_device(options.device)
    report = run(device, small=options.small, budget=options.budget, path=options.json)
    print_table(report.lines, "correctness")
    return int(bool(failed(report.lines)))


if __name__ == "__main__":
    sys.exit(main())
