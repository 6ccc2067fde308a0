"""The part of docs/results.md that comes from benchmarks/gpu/: kernels and whole steps."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reproduce.tables import NOTHING, Table, markdown, show_commit

Lines = Mapping[str, Mapping[str, Any]]
ARMS = ("vanilla", "vanilla_fused", "apex_torch", "apex_kernels", "apex_kernels_fused")
MONARCH = re.compile(r"K1 (fold|map gradient) (.+)")


SECTIONS = ("training_step", "bandwidth", "correctness")


def gpu_sections(folder: Path) -> Iterator[str]:
    """Every part of `benchmarks/gpu/run_all.py` from the newest file that has it; else nothing."""
    files = [(json.loads(path.read_text()), path) for path in folder.glob("????-??-??-*.json")]
    files.sort(key=lambda pair: pair[0]["machine"]["date"])
    newest = {part: (content, path) for content, path in files for part in content["parts"]}
    if not newest:
        return
    yield (
        "## What a GPU takes\n\n`python benchmarks/gpu/run_all.py`. The paper has no kernels; its "
        "overhead of a step is 0.7 % of the time and 1.01 times the FLOPs.\n"
    )
    dates = {
        content["machine"]["commit"]: content["machine"]["date"] for content, _ in newest.values()
    }
    if len(dates) > 1:
        last = max(dates, key=dates.get)
        again = [
            part
            for part in SECTIONS
            if part in newest and newest[part][0]["machine"]["commit"] != last
        ]
        words = " and ".join(part.replace("_", " ") for part in again)
        yield f"**Of an older commit than the rest: {words}.** Kernels have changed since then.\n"
    write = {
        "training_step": step_section, "bandwidth": kernel_section, "correctness": test_section,
    }  # fmt: skip
    for part in filter(newest.get, SECTIONS):
        content, path = newest[part]
        yield f"{write[part](content['parts'][part])}\n{_source(content['machine'], path)}\n"


def test_section(part: Mapping[str, Any]) -> str:
    """How many tests have passed."""
    passed = sum(line["met"] is True for line in part["lines"])
    return f"**Correctness.** {passed} of {len(part['lines'])} kernel tests pass on this device.\n"


def _source(machine: Mapping[str, Any], path: Path) -> str:
    versions = machine["versions"]
    return (
        f"{machine['device']}, driver {machine['driver']}, "
        f"CUDA {machine['cuda']}, torch {versions['torch']}, triton {versions['triton']}; "
        f"{machine['date'][:10]}; commit {show_commit(machine['commit'])}; all numbers in "
        f"[{path.name}](../benchmarks/results/{path.name})."
    )


def _by_what(part: Mapping[str, Any]) -> Lines:
    return {line["what"]: line for line in part["lines"]}


def step_section(part: Mapping[str, Any]) -> str:
    """Seconds and memory of the five arms."""
    lines, options = _by_what(part), part["facts"]["options"]
    rows = []
    for arm in ARMS:
        seconds, peak = lines.get(arm), lines.get(f"{arm}: peak memory")
        if seconds is None or peak is None:
            continue
        rate = options["sequences"] * options["length"] / seconds["seconds"]["median"]
        ratios = [_ratio(lines.get(f"{arm} / {base}")) for base in ARMS[:2]]
        cells = [f"{seconds['seconds']['median']:.3f}", f"{rate:,.0f}", *ratios]
        rows.append([f"`{arm}`", *cells, f"{peak['peak_bytes'] / 1e9:.2f}"])
    head = ["arm", "s a step", "tokens/s", "beside vanilla", "beside vanilla_fused", "peak, GB"]
    facts = part["facts"]
    text = (
        f"**A training step** of {facts['parameters'] / 1e9:.2f} B parameters (TinyLLaMA's shape), "
        f"{options['sequences']} sequences of {options['length']:,} tokens in microbatches of "
        f"{options['microbatch']}, {options['precision']}, attention: {facts['attention']}; "
        f"medians of {options['rounds']} rounds in which arms take turns, ratios round by round "
        "with their quartiles. `fused`: K3 in place of torch's SwiGLU. Goals: at most 0.3 % beside "
        "the same model without APEX, and 1 % faster than `vanilla` when fused. "
        f"{missed(part)}\n"
    )
    return f"{text}\n{markdown(Table('', head, rows))}\n"


def missed(part: Mapping[str, Any]) -> str:
    """The goals that were not met, each with what was found."""
    found = [
        f"`{line['what']}` {line['found'].partition(' (')[0]} (goal {line['target']})"
        for line in sorted(part["lines"], key=lambda line: line["what"])
        if line["met"] is False
    ]
    return f"Missed: {', '.join(found)}.".replace("-", "−") if found else "All are met."


def _ratio(line: Mapping[str, Any] | None) -> str:
    if line is None:
        return NOTHING
    values = [100 * (line["ratio"][k] - 1) for k in ("median", "lower_quartile", "upper_quartile")]
    return "{:+.2f} % ({:+.2f} to {:+.2f})".format(*values).replace("-", "−")


def kernel_section(part: Mapping[str, Any]) -> str:
    """K1 by its sites; K2 and K3 by what they do."""
    lines = _by_what(part)
    kernels = [what for what, line in lines.items() if "share_of_copy" in line]
    sites = dict.fromkeys(match[2] for match in map(MONARCH.fullmatch, kernels) if match)
    monarch = [
        [site, *(cell for call in ("fold", "map gradient") for cell in _cells(lines, call, site))]
        for site in sites
    ]
    head = ["sites", "fold, ms", "of copy", "bmm", "map gradient, ms", "of copy", "bmm"]
    others = [
        [what, _milliseconds(lines[what]), _share(lines[what]), *_times(lines, what)]
        for what in kernels
        if not MONARCH.fullmatch(what)
    ]
    text = (
        "**Kernels.** `of copy`: time of a device copy of as many bytes over the kernel's, in bold "
        "where the goal is missed (K1 70 %, K2 and K3 85 %). `bmm`, `torch`, `Liger`: time of that "
        "over the kernel's, below 1 where it is faster. K1 is the Monarch operator (`bmm`: torch's "
        "batched products), K2 the norms, K3 SwiGLU. `x44`: so many weights in one call.\n"
    )
    tables = (
        Table("", head, monarch),
        Table("", ["kernel", "ms", "of copy", "torch", "Liger"], others),
    )
    return "\n".join([text, *(f"{markdown(table)}\n" for table in tables if table.rows)])


def _cells(lines: Lines, call: str, site: str) -> Sequence[str]:
    what = f"K1 {call} {site}"
    if what not in lines:
        return [NOTHING] * 3
    return [_milliseconds(lines[what]), _share(lines[what]), _time(lines.get(f"{what}: bmm"))]


def _milliseconds(line: Mapping[str, Any]) -> str:
    return f"{1000 * line['seconds']['median']:.3f}"


def _share(line: Mapping[str, Any]) -> str:
    text = f"{100 * line['share_of_copy']:.1f} %"
    return text if line["met"] else f"**{text}**"


def _times(lines: Lines, what: str) -> Sequence[str]:
    eager = lines.get(f"{what}: eager") or lines.get(f"{what}: torch")
    return [_time(eager), _time(lines.get(f"{what}: Liger"))]


def _time(line: Mapping[str, Any] | None) -> str:
    return NOTHING if line is None else f"{line['times_the_kernels']:.2f}"
