"""What the Monarch structure saves on the CPU, against an expansion operator T that is dense.

The operator of TinyLLaMA's gate projection, n = 704 rows of 2048 columns, in the same process and
in turns: the product T X alone, and the whole fold W[N] += T W[P], whose gathering and adding cost
the same for both. Prints the times and the ratios, dense over Monarch, with their spread; exits
with 1 if that of the product is below --goal.

    python benchmarks/kernels_cpu.py --pairs 20
"""

import argparse
import ctypes
import statistics
import sys
from collections.abc import Callable

import torch
from paired import command_line, ratio_text, ratios, timed, turns, write

from apex_composer.ops import reference
from apex_composer.ops.monarch import init_factors, multiply, to_dense

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

WORK = ("product", "fold")
ARMS = ("Monarch", "dense")


def build(arguments: argparse.Namespace) -> dict[tuple[str, str], Callable[[], None]]:
    """Product and fold of both arms, each arm on a weight of its own."""
    generator = torch.Generator().manual_seed(17)
    n, shape = arguments.size, (arguments.channels, arguments.width)
    weights = [torch.randn(shape, generator=generator) for _ in ARMS]
    order = torch.randperm(arguments.channels, generator=generator)
    sets = order[:n].sort().values, order[n : 2 * n].sort().values
    selected = [reference.take(weight, sets[0], 0) for weight in weights]
    factors = init_factors(n, generator=generator)
    factors.left.normal_(generator=generator).mul_(0.01)
    operator = to_dense(factors)

    def fold_dense() -> None:
        delta = operator @ reference.take(weights[1], sets[0], 0)
        reference.add(weights[1], delta, sets[1], axis=0)

    return {
        ("product", "Monarch"): lambda: multiply(factors, selected[0]),
        ("product", "dense"): lambda: operator @ selected[1],
        ("fold", "Monarch"): lambda: reference.fold(weights[0], factors, *sets, axis=0),
        ("fold", "dense"): fold_dense,
    }


def keep_memory() -> None:
    """Let glibc keep what is freed, as a training's heap does.

    Otherwise every call of this small process returns its results' memory to the kernel and gets
    it back page by page, which takes up to three times as long as the products themselves.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            mallopt(parameter, 2**30)


def measure(arguments: argparse.Namespace) -> dict[tuple[str, str], list[float]]:
    """Seconds of every call."""
    calls = build(arguments)
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
    for order in turns(calls, arguments.warmup + arguments.pairs):
        for name in order:
            seconds[name].append(timed(calls[name], arguments.repeats))
    return {name: own[arguments.warmup :] for name, own in seconds.items()}


def summarise(seconds: dict[tuple[str, str], list[float]], work: str) -> dict[str, float]:
    """Of the product or the fold. Ratios pair by pair, so that the machine's drift cancels."""
    monarch, dense = (seconds[work, arm] for arm in ARMS)
    return {
        "monarch_median_seconds": statistics.median(monarch),
        "dense_median_seconds": statistics.median(dense),
        **ratios(dense, monarch),
    }


def parse() -> argparse.Namespace:
    """The command line."""
    numbers = {"size": 704, "channels": 5632, "width": 2048}
    numbers |= {"pairs": 20, "repeats": 3, "warmup": 2, "threads": 2}
    parser = command_line(__doc__.splitlines()[0], numbers)
    parser.add_argument("--goal", type=float, default=5.0, help="exit with 1 below this ratio")
    return parser.parse_args()


def main() -> int:
    """Measure, print, compare with the goal."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    keep_memory()
    with torch.no_grad():
        seconds = measure(arguments)
    results = {work: summarise(seconds, work) for work in WORK}
    for work, result in results.items():
        print(
            f"{work} of {arguments.size} x {arguments.width}: "
            f"Monarch {1000 * result['monarch_median_seconds']:.2f} ms, "
            f"dense {1000 * result['dense_median_seconds']:.2f} ms, "
            f"dense / Monarch: {ratio_text(result, 2)}"
        )
    write(arguments.json, results)
    return int(results["product"]["ratio_median"] < arguments.goal)


if __name__ == "__main__":
    sys.exit(main())
