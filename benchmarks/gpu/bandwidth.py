"""How near do the kernels come to the speed of memory? Against a copy of as many bytes.

Every kernel is timed beside a device copy that moves the same number of bytes in the same run, and
beside what it replaces. Goals: 85 % of the copy for norms (K2) and SwiGLU (K3), 70 % for fold and
gradient map (K1).

    python benchmarks/gpu/bandwidth.py --json bandwidth.json
"""

import argparse
import sys
from collections.abc import Sequence
from functools import cache

import checkout
import torch
from machine import choose_device, command_line, progress_bar
from measuring import Deadline, device_seconds, quartiles
from report import Report, print_table

checkout.activate()

from bandwidth_cases import Case, all_cases  # noqa: E402

GOALS = {"K1": 0.70, "K2": 0.85, "K3": 0.85}


@cache
def copy_seconds(moved: int, device: torch.device, repeats: int) -> float:
    """Median seconds of a device copy that moves so many bytes, reading and writing."""
    source = torch.ones(max(moved // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times, _ = device_seconds(lambda: target.copy_(source), device, repeats)
    return quartiles(times)["median"]


def measure(case: Case, report: Report, device: torch.device, repeats: int) -> None:
    """The kernel's line, and one for each of the others."""
    times, host = device_seconds(case.launch, device, repeats)
    seconds, moved = quartiles(times), case.traffic.moved
    copy = copy_seconds(moved, device, repeats)
    share, goal = copy / seconds["median"], GOALS[case.kernel]
    needed = copy_seconds(case.traffic.needed, device, repeats) / seconds["median"]
    rate = moved / seconds["median"] / 1e12
    text = f"{100 * share:.1f} % of copy: {rate:.2f} TB/s, {_milliseconds(seconds['median'])}"
    if case.traffic.needed != moved:
        text += f" ({100 * needed:.1f} % by the bytes that are needed)"
    report.add(
        f"{case.kernel} {case.what}", f"{text}; passes: {case.traffic.passes}",
        f">= {100 * goal:.0f} % of copy", share >= goal,
        seconds=seconds, host_seconds=host, copy_seconds=copy, share_of_copy=share,
        needed_share_of_copy=needed, **case.traffic._asdict(),
    )  # fmt: skip
    for name, launch in case.others.items():
        what = f"{case.kernel} {case.what}: {name}"
        if launch is None:
            report.add(what, f"{name} is not installed")
            continue
        times, host = device_seconds(launch, device, repeats)
        other = quartiles(times)
        ratio = other["median"] / seconds["median"]
        text = f"{_milliseconds(other['median'])}, {ratio:.2f} times the kernel's"
        report.add(what, text, seconds=other, host_seconds=host, times_the_kernels=ratio)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3f} ms"


def run(device: torch.device, options: argparse.Namespace) -> Report:
    """All kernels, each with a line of its own and one for each of its rivals.

    Args:
        device: of the kernels; on the CPU the times mean nothing.
        options: of `parse`.
    """
    report, deadline = Report("bandwidth", options.json), Deadline(options.budget)
    large = 2**16 if options.small else 2**31
    rate = large / copy_seconds(large, device, options.repeats)
    report.facts["copy_bytes_per_second"] = rate
    report.add(f"copy of {large / 2**30:.1f} GiB, read and written", f"{rate / 1e12:.2f} TB/s")
    groups = list(all_cases(device, small=options.small))
    for place, cases in enumerate(progress_bar(groups, desc="groups of kernels", delay=5)):
        if not deadline.allows():
            report.add(f"{len(groups) - place} groups of kernels", "not run: no time was left")
            return report
        for case in cases:
            measure(case, report, device, options.repeats)
    report.finish()
    return report


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--repeats", type=int, default=20, help="measured calls of each kernel")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; goals that are missed are shown, and are not an error."""
    options = parse(arguments)
    report = run(choose_device(options.device), options)
    print_table(report.lines, "bandwidth")
    return 0


if __name__ == "__main__":
    sys.exit(main())
