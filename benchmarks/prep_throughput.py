"""Tokens per second of `apex-composer prep`, of llm-foundry's converter, and of tokenising alone.

They take turns on the same texts, tokenizer and cores, for each family of tokenizers that LLMs
use: our pipeline with as many workers as cores; the same on a Ray of this machine;
`convert_dataset_json` of llm-foundry 0.22 as it is (one process); the tokenizer's
`encode_batch_fast` with as many threads as cores, which reads and writes nothing; and our word
encoder in its place, on one core. Start-up is not counted on any side: each is run on a few
documents per domain too, and their time and tokens are subtracted.

    python benchmarks/prep_throughput.py --repeats 3
    python benchmarks/prep_throughput.py --sides ours ray --families byte-level --copies 8
    python benchmarks/prep_throughput.py --cores 1 --sides word-encoder encode_batch_fast
    python benchmarks/prep_throughput.py --data FOLDER --tokenizer FOLDER --json result.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from prep_inputs import FAMILIES, write_texts, write_tokenizer
from prep_sides import SIDES

from apex_composer.data_prep.progress import progress_bar
from apex_composer.data_prep.tokens.tokenizer import load_tokenizer

Measured = dict[str, list[dict[str, float]]]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="RedPajama folder; default: embedded corpus")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--tokenizer", help="folder or hub name, in place of trained ones")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--vocabulary", type=int, default=32_000, help="tokens of the tokenizer")
    parser.add_argument("--sequence", type=int, default=4096, help="tokens in a sequence")
    parser.add_argument("--cores", type=int, default=2, help="cores, workers and threads")
    parser.add_argument("--megabytes", type=float, default=200.0, help="text to take")
    parser.add_argument("--copies", type=int, default=1, help="of each text, for a longer job")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each side")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    # How the benchmark starts itself for one measurement, so that no side warms another.
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# Ratio of two sides: its name, what is compared, the better one and the other.
RATIOS = {
    "cost of Ray": ("rate", "ours", "ray"),
    "speedup over llm-foundry": ("rate", "ours", "llm-foundry"),
    "overhead over encode_batch_fast": ("rate", "encode_batch_fast", "ours"),
    "gain of the word encoder": ("core_rate", "word-encoder", "encode_batch_fast"),
}


def measure(
    arguments: argparse.Namespace, side: str, work: Path, tokenizer: Path
) -> dict[str, float]:
    """Measure one side in a process of its own, with start-up subtracted."""
    command = [sys.executable, __file__, "--side", side, "--work", str(work)]
    command += [f"--tokenizer={tokenizer}", f"--sequence={arguments.sequence}"]
    command += [f"--cores={arguments.cores}"]
    environment = os.environ | {
        "RAYON_NUM_THREADS": str(arguments.cores),
        "TOKENIZERS_PARALLELISM": "true" if arguments.cores > 1 else "false",
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{side} failed:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def measure_here(arguments: argparse.Namespace) -> dict[str, float]:
    """The work of such a process: on a few documents per domain, then on all."""
    run = partial(SIDES[arguments.side], arguments, arguments.work)
    run("few")  # imports, which the next two do not repeat
    few = [run("few") for _ in range(2)]
    small = {name: min(one[name] for one in few) for name in few[0]}
    result = run("all")
    tokens = result["tokens"] - small["tokens"]
    result["startup"] = small["seconds"]
    result["rate"] = tokens / (result["seconds"] - small["seconds"])
    if "core_seconds" in result:
        result["core_rate"] = tokens / (result["core_seconds"] - small["core_seconds"])
    return result


def report(measured: Measured) -> dict[str, dict[str, float]]:
    """Rates, and the ratios of measurements of the same round with their spread."""
    found: dict[str, dict[str, float]] = {}
    for side, results in measured.items():
        rates = [result["rate"] for result in results]
        found[side] = {"tokens_per_second": statistics.median(rates), **spread(rates)}
        if "core_rate" in results[0]:
            cores = [result["core_rate"] for result in results]
            found[side]["tokens_per_core_second"] = statistics.median(cores)
        if "bytes" in results[0]:
            found[side]["bytes_per_token"] = results[0]["bytes"] / results[0]["tokens"]
    for name, (quantity, side, other) in RATIOS.items():
        if side in measured and other in measured:
            pairs = zip(measured[side], measured[other], strict=True)
            ratios = [first[quantity] / second[quantity] for first, second in pairs]
            found[name] = {"ratio": statistics.median(ratios), **spread(ratios)}
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Smallest and largest value."""
    return {"least": min(values), "most": max(values)}


def show(found: dict[str, dict[str, float]]) -> None:
    """Print a table."""
    for name, row in found.items():
        if "ratio" in row:
            print(f"{name:32} {row['ratio']:10.2f}  ({row['least']:.2f} to {row['most']:.2f})")
            continue
        disk = f"  {row['bytes_per_token']:.3f} bytes/token" if "bytes_per_token" in row else ""
        rate, least, most = (row[key] / 1e6 for key in ("tokens_per_second", "least", "most"))
        core = row.get("tokens_per_core_second")
        spent = "" if core is None else f"{core / 1e6:.3f} per core-second"
        print(f"{name:32} {rate:10.3f}  ({least:.3f} to {most:.3f}) M tok/s  {spent}{disk}")


def measure_family(arguments: argparse.Namespace, work: Path, tokenizer: Path) -> Measured:
    """All sides in turn, as often as asked for."""
    measured: Measured = {side: [] for side in SIDES if side in arguments.sides}
    for side in progress_bar([*measured] * arguments.repeats, desc=tokenizer.name, unit="run"):
        measured[side].append(measure(arguments, side, work, tokenizer))
    return measured


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    if arguments.side:
        print(json.dumps(measure_here(arguments)))
        return
    results = {}
    with tempfile.TemporaryDirectory(prefix="prep-throughput-") as folder:
        texts = write_texts(arguments.data, arguments.megabytes, Path(folder), arguments.copies)
        for family in [arguments.tokenizer] if arguments.tokenizer else arguments.families:
            tokenizer = Path(folder) / "tokenizers" / Path(family).name
            if arguments.tokenizer:
                load_tokenizer(family, tokenizer)
            else:
                write_tokenizer(family, texts, arguments.vocabulary, tokenizer)
            measured = measure_family(arguments, Path(folder), tokenizer)
            found = report(measured)
            results[family] = {"summary": found, "runs": measured}
            print(f"\n{family}")
            show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
