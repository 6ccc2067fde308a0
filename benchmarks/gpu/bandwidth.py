"""How near do the kernels come to the speed of memory? Against a copy of as many bytes.

Every kernel is timed beside a device copy that moves the same number of bytes in the same run, and
beside what it replaces. Goals: 85 % of the copy for norms (K2) and SwiGLU (K3), 70 % for fold and
gradient map (K1).

    python benchmarks/gpu/bandwidth.py --json bandwidth.json
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import checkout
import torch
from measuring import Deadline, device_seconds, quartiles
from report import Report, print_table

checkout.activate()

from bandwidth_cases import Case, all_cases  # noqa: E402
from machine import choose_device, command_line, progress_bar  # noqa: E402

GOALS = {"K1": 0.70, "K2": 0.85, "K3": 0.85}


class Copies:
    """Seconds of a device copy that moves so many bytes, reading and writing; measured once each.

    Args:
        device: that copies.
        repeats: of the measurement.
    """

    def __init__(self, device: torch.device, repeats: int):
        self._device, self._repeats = device, repeats
        self._seconds: dict[int, float] = {}

    def seconds(self, moved: int) -> float:
        """Median seconds of a copy that moves `moved` bytes in all."""
        if moved not in self._seconds:
            source = torch.ones(max(moved // 2, 1), dtype=torch.uint8, device=self._device)
            target = torch.empty_like(source)
            times, _ = device_seconds(lambda: target.copy_(source), self._device, self._repeats)
            self._seconds[moved] = quartiles(times)["median"]
        return self._seconds[moved]


def measure(case: Case, copies: Copies, report: Report, device: torch.device, repeats: int) -> None:
    """The kernel's line, and one for each of the others."""
    times, host = device_seconds(case.launch, device, repeats)
    seconds, moved = quartiles(times), case.traffic.moved
    copy = copies.seconds(moved)
    share, goal = copy / seconds["median"], GOALS[case.kernel]
    needed = copies.seconds(case.traffic.needed) / seconds["median"]
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


def run(
    device: torch.device,
    *,
    small: bool = False,
    repeats: int = 20,
    budget: float | None = None,
    path: Path | None = None,
) -> Report:
    """All kernels, each with a line of its own and one for each of its rivals.

    Args:
        device: of the kernels; on the CPU the times mean nothing.
        small: tiny shapes, to try the script.
        repeats: measured calls of each.
        budget: seconds after which no further group of cases begins.
        path: of the JSON file.
    """
    report, deadline, copies = Report("bandwidth", path), Deadline(budget), Copies(device, repeats)
    large = 2**16 if small else 2**31
    rate = large / copies.seconds(large)
    report.facts["copy_bytes_per_second"] = rate
    report.add(f"copy of {large / 2**30:.1f} GiB, read and written", f"{rate / 1e12:.2f} TB/s")
    groups = list(all_cases(device, small=small))
    for place, cases in enumerate(progress_bar(groups, desc="groups of kernels", delay=5)):
        if not deadline.allows():
            report.add(f"{len(groups) - place} groups of kernels", "not run: no time was left")
            return report
        for case in cases:
            measure(case, copies, report, device, repeats)
    report.finish()
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; goals that are missed are shown, and are not an error."""
    parser = command_line(__doc__)
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--repeats", type=int, default=20, help="measured calls of each kernel")
    options = parser.parse_args(arguments)
    report = run(
        choose_device(options.device),
        small=options.small,
        repeats=options.repeats,
        budget=options.budget,
        path=options.json,
    )
    print_table(report.lines, "bandwidth")
    return 0


if __name__ == "__main__":
    sys.exit(main())
