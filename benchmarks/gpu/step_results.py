"""From seconds and bytes of the arms to the lines of the table."""

from typing import Any

from arms import ARMS
from measuring import quartiles, ratios
from report import Report

# The largest ratios of an arm's step time to its base's that meet the target.
TIME_TARGETS = {
    ("apex_kernels_fused", "vanilla_fused"): 1.003,
    ("apex_kernels", "vanilla"): 1.003,
    ("apex_kernels_fused", "vanilla"): 0.99,
}
# Share of vanilla's peak that APEX may take more than the vanilla arm with the same SwiGLU.
MEMORY_TARGET = 0.03


def report_arms(report: Report, found: dict[str, dict[str, list]], tokens: int) -> None:
    """Lines of every arm, of the targets, and of the memory.

    Args:
        report: to which they are added; its facts know the FLOPs.
        found: seconds and peak bytes of every arm, round by round.
        tokens: of one step.
    """
    for name, own in found.items():
        _report_arm(report, name, own["seconds"], tokens)
    pairs = [(name, base) for name in found for base in ("vanilla", "vanilla_fused")]
    for name, base in dict.fromkeys([*TIME_TARGETS, *pairs]):
        if name != base:
            ratio = ratios(found[name]["seconds"], found[base]["seconds"])
            _report_ratio(report, name, base, ratio)
    _report_memory(report, {name: max(own["peak_bytes"]) for name, own in found.items()})


def _report_arm(report: Report, name: str, seconds: list[float], tokens: int) -> None:
    spread = quartiles(seconds)
    flops = report.facts["flops_per_token"] * tokens / spread["median"]
    peak = report.facts["peak_flops"]
    mfu = None if peak is None else flops / peak
    share = f"MFU unknown ({report.facts['peak_source']})"
    if mfu is not None:
        share = f"MFU {100 * mfu:.1f} % of {peak / 1e12:.0f} TFLOP/s"
    text = (
        f"{spread['median']:.4f} s (quartiles {spread['lower_quartile']:.4f} to "
        f"{spread['upper_quartile']:.4f}, {len(seconds)} steps), "
        f"{tokens / spread['median']:.0f} tokens/s, {share}"
    )
    report.add(name, text, arm=name, seconds=spread, flops_per_second=flops, mfu=mfu)


def _report_ratio(report: Report, name: str, base: str, ratio: dict[str, float]) -> None:
    target: dict[str, Any] = {}
    if largest := TIME_TARGETS.get((name, base)):
        met = ratio["median"] <= largest
        target = {"target": f"<= {100 * (largest - 1):+.1f} %", "met": met}
    percent = {key: 100 * (value - 1) for key, value in ratio.items()}
    text = (
        f"{percent['median']:+.2f} % (quartiles {percent['lower_quartile']:+.2f} to "
        f"{percent['upper_quartile']:+.2f})"
    )
    report.add(f"{name} / {base}", text, arm=name, base=base, ratio=ratio, **target)


def _report_memory(report: Report, peaks: dict[str, int]) -> None:
    vanilla = peaks["vanilla"]
    for name, peak in peaks.items():
        text, what = f"{peak / 1e9:.2f} GB", f"{name}: peak memory"
        if not vanilla:  # the CPU has no such count
            report.add(what, "not measured on this device", arm=name)
        elif ARMS[name].implementation is None:
            report.add(what, text, arm=name, peak_bytes=peak)
        else:
            extra = (peak - peaks[ARMS[name].base]) / vanilla
            target = {"target": f"< {100 * MEMORY_TARGET:.0f} % more", "met": extra < MEMORY_TARGET}
            if name == "apex_torch":
                target = {}
            text += f", {100 * extra:+.2f} % of vanilla's beyond {ARMS[name].base}"
            report.add(
                what, text, **target, arm=name, base=ARMS[name].base, peak_bytes=peak,
                extra_share=extra,
            )  # fmt: skip


def missed_arms(report: Report) -> list[str]:
    """Arms with a missed target, and those that they are compared with, each once."""
    names = []
    for line in report.lines:
        if line["met"] is False:
            names += [line["base"], line["arm"]]
    return list(dict.fromkeys(names))
