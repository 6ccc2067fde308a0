"""Calls that take turns: ratios of times pair by pair, in which the machine's drift cancels."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from apex_composer.data_prep.progress import progress_bar


def timed(call: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds of one call, from several in a row, a GPU's work included."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - start) / repeats


def turns(names: Iterable[Any], count: int) -> Iterator[list[Any]]:
    """The names in an order that alternates: whoever comes second finds a warmer machine."""
    for i in progress_bar(range(count), desc="pairs", delay=5):
        yield sorted(names, reverse=i % 2 == 0)


def ratios(seconds: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of every pair."""
    pairs = [own / other for own, other in zip(seconds, base, strict=True)]
    low, middle, high = statistics.quantiles(pairs, n=4)
    return {
        "ratio_median": middle,
        "ratio_lower_quartile": low,
        "ratio_upper_quartile": high,
        "pairs": len(pairs),
    }


def ratio_text(result: Mapping[str, float], digits: int) -> str:
    """What `ratios` found, in words."""
    low, high = result["ratio_lower_quartile"], result["ratio_upper_quartile"]
    return (
        f"median {result['ratio_median']:.{digits}f} (quartiles {low:.{digits}f} to "
        f"{high:.{digits}f}, {result['pairs']} pairs)"
    )


def command_line(description: str, numbers: Mapping[str, int]) -> argparse.ArgumentParser:
    """A parser with whole numbers, whose defaults are the setting that the goal is given for."""
    parser = argparse.ArgumentParser(description=description)
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser


def write(path: Path | None, result: Mapping[str, Any]) -> None:
    """The JSON file, where one is asked for."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")
