"""All questions one after the other: one table, one file of results. Under 25 minutes on an H200.

    python benchmarks/gpu/run_all.py
    python benchmarks/gpu/run_all.py --parts correctness bandwidth --out results.json
    python benchmarks/gpu/run_all.py --parts training_step --out results.json    # added to it

Each part is a process of its own, so that a kernel which breaks the device's context costs one
part, with a limit on its time. Exits with 1 where correctness fails or a part breaks down; targets
that are missed are reported, and are an error with --strict only.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import checkout
from machine import choose_device, describe, needs_pytest, now, progress_bar
from report import Report, failed, print_table, read_json, write_json
from tqdm.auto import tqdm

checkout.activate()

# Seconds of each part, and of grace for what it has begun: 1,455 in all at most.
BUDGETS = {"correctness": 300, "bandwidth": 240, "training_step": 780}
GRACE = 45
_LOG_LINES = 25


def launch(part: str, arguments: Sequence[str], limit: float) -> tuple[int, str]:
    """Run a part's script in a process of its own.

    Args:
        part: name of the script.
        arguments: of its command line.
        limit: seconds after which it is ended.

    Returns:
        Its exit status (124: ended), and the last lines of what it wrote to stderr.
    """
    script = Path(__file__).with_name(f"{part}.py")
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        try:
            status = subprocess.run(
                [sys.executable, str(script), *arguments],
                stdout=subprocess.DEVNULL,
                stderr=log,
                timeout=limit,
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
        log.seek(0)
        return status, "".join(log.readlines()[-_LOG_LINES:])


def run_part(part: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A part's report, with its exit status and, where it broke down, what it said last."""
    path, budget = folder / f"{part}.json", getattr(options, f"{part}_budget")
    arguments = ["--json", str(path), "--budget", str(budget), "--device", options.device]
    if part == "training_step":
        profiles = options.out.with_suffix("") / "profiles"
        arguments += ["--profile", "missed", "--profiles", str(profiles), *options.step.split()]
    elif options.small and part == "bandwidth":
        arguments.append("--small")
    start = time.monotonic()
    status, log = launch(part, arguments, budget + GRACE)
    result = read_json(path) or Report(part).as_dict()
    result |= {"date": now(), "exit_status": status, "seconds": round(time.monotonic() - start, 1)}
    if broke_down(result):
        tqdm.write(f"{part} broke down:\n{log}", file=sys.stderr)
        result["error"] = next(reversed(log.strip().splitlines()), "")
    return result


def broke_down(result: dict[str, Any]) -> bool:
    """Whether a part ended otherwise than by saying what it found."""
    allowed = (0, 1) if result["part"] == "correctness" and result["lines"] else (0,)
    return result["exit_status"] not in allowed


def earlier_parts(path: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """Parts that a file holds already, of the same commit on the same machine; else none."""
    content = read_json(path)
    if content is None:
        return {}
    same = all(content["machine"][key] == value for key, value in machine.items() if key != "date")
    return content["parts"] if same else {}


def default_path(machine: dict[str, Any]) -> Path:
    """benchmarks/results/<date>-<gpu>.json"""
    words = "".join(c if c.isalnum() else " " for c in machine["device"].lower()).split()
    name = "-".join([date.today().isoformat(), *words])
    return checkout.ROOT / "benchmarks" / "results" / f"{name}.json"


def table_lines(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of all parts (tests that pass: counted), and one for each that is not whole."""
    lines = []
    for name, result in parts.items():
        own = result["lines"]
        if name == "correctness":
            wrong = failed(own)
            what = f"{len(own) - len(wrong)} tests of kernels"
            passed = {"part": name, "what": what, "found": "pass", "target": "", "met": True}
            own = wrong + [passed] * (len(wrong) < len(own))
        lines += own
        if broke_down(result):
            text = f"broke down with exit status {result['exit_status']}: {result['error']}"
            lines.append({"part": name, "what": name, "found": text, "target": "", "met": False})
    return lines


def exit_status(parts: dict[str, Any], *, strict: bool) -> int:
    """1 where correctness fails or a part broke down; with `strict`, also for missed targets."""
    missed = strict and failed(table_lines(parts))
    return int(bool(missed) or any(result["exit_status"] for result in parts.values()))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(BUDGETS), default=list(BUDGETS))
    parser.add_argument("--out", type=Path, help="default benchmarks/results/<date>-<gpu>.json")
    for part, seconds in BUDGETS.items():
        parser.add_argument(
            f"--{part.replace('_', '-')}-budget", type=float, default=seconds,
            help=f"seconds after which it takes on nothing more, default {seconds}",
        )  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="missed targets are errors too")
    parser.add_argument("--commit", help="where the checkout is not a git repository")
    parser.add_argument("--device", default="cuda", help="cpu interprets the kernels")
    parser.add_argument("--small", action="store_true", help="tiny shapes of kernels in bandwidth")
    parser.add_argument(
        "--step", default="", help="further options of training_step.py in one string"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts in their order, write the file after each, print one table."""
    options = parse(arguments)
    if "correctness" in options.parts:
        needs_pytest()
    device = choose_device(options.device)
    machine = describe(device, options.commit)
    options.out = options.out or default_path(machine)
    parts = earlier_parts(options.out, machine)
    wanted = [part for part in BUDGETS if part in options.parts]
    with tempfile.TemporaryDirectory() as folder:
        for part in progress_bar(wanted, desc="parts"):
            parts[part] = run_part(part, options, Path(folder))
            parts = {name: parts[name] for name in BUDGETS if name in parts}
            write_json(options.out, {"machine": machine, "parts": parts})
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    title = f"{machine['device']}, driver {machine['driver']}, {versions}, {machine['commit']}"
    if not machine["compiled"]:
        title += "\nINTERPRETED ON THE CPU: the times mean nothing"
    print_table(table_lines(parts), title)
    print(f"written to {options.out}")
    return exit_status(parts, strict=options.strict)


if __name__ == "__main__":
    sys.exit(main())
