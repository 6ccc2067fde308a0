"""Tokens per second of `apex-composer prep`, of llm-foundry's converter, and of tokenising alone.

The three take turns on the same texts, tokenizer and cores: our pipeline with as many workers as
cores; `convert_dataset_json` of llm-foundry 0.22 as it is (one process); and the tokenizer's
`encode_batch` with as many threads as cores, which reads and writes nothing: the floor.
Start-up is not counted on either side: each is run on a few documents per domain too, and their
time and tokens are subtracted. Exits with 1 when a bound is missed.

    python benchmarks/prep_throughput.py --repeats 3
    python benchmarks/prep_throughput.py --data FOLDER --json result.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

EOS = "<|end_of_text|>"
BATCH_CHARACTERS = 1 << 19
# A domain of the embedded corpus at most: all that there is, for start-up to be a small part.
EMBEDDED_BYTES = 60_000_000
FEW_BYTES = 100_000  # some sequences for every domain, and a hundredth of the whole at most


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="RedPajama folder; default: embedded corpus")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="tokens of the tokenizer")
    parser.add_argument("--sequence", type=int, default=4096, help="tokens in a sequence")
    parser.add_argument("--cores", type=int, default=2, help="cores, workers and threads")
    parser.add_argument("--megabytes", type=float, default=200.0, help="text used at most")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each side")
    parser.add_argument("--least-speedup", type=float, default=4.0, help="over llm-foundry")
    parser.add_argument("--most-overhead", type=float, default=1.3, help="over the floor")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    # How the benchmark starts itself for one measurement, so that no side warms another.
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_inputs(arguments: argparse.Namespace, work: Path) -> None:
    """Write the texts as plain jsonl without `meta`, all that llm-foundry's converter can read.

    `<work>/all` has them all and `<work>/few` the first of every domain; the same files stand
    flat in `<work>/all-flat` and `<work>/few-flat`, because the converter takes no sub-folders.
    """
    from apex_composer.data_prep.embedded import write_embedded_corpus
    from apex_composer.data_prep.readers import find_sources, read_documents
    from apex_composer.data_prep.tokenizer import save_tokenizer, train_tokenizer

    data = arguments.data or write_embedded_corpus(work / "embedded", domain_limit=EMBEDDED_BYTES)
    sources = find_sources(data)
    limit = arguments.megabytes * 1e6 / len({source.domain for source in sources})
    texts, taken = [], Counter()
    for source in tqdm(sources, desc="reading", unit="file"):
        for document in read_documents(source, 0, None, lambda *reject: None):
            size = len(document.text.encode())
            if taken[document.domain] + size > limit:
                continue
            kinds = ("all", "few") if taken[document.domain] < FEW_BYTES else ("all",)
            taken[document.domain] += size
            texts.append(document.text)
            for kind in kinds:
                path = work / kind / document.domain / f"{document.domain}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a") as file:
                    file.write(json.dumps({"text": document.text}) + "\n")
    for kind in ("all", "few"):
        flat = work / f"{kind}-flat"
        flat.mkdir()
        for path in sorted((work / kind).rglob("*.jsonl")):
            os.link(path, flat / path.name)
    save_tokenizer(train_tokenizer(texts, arguments.vocabulary), work / "tokenizer")


def run_ours(arguments: argparse.Namespace, work: Path, kind: str) -> dict[str, float]:
    """Our pipeline: seconds, tokens in its shards, and their bytes."""
    from apex_composer.data_prep.options import Options
    from apex_composer.data_prep.preparation import prepare

    with tempfile.TemporaryDirectory(dir=work) as folder:
        out = Path(folder) / "out"
        # Pieces small enough that both cores have work to the end, as they do in a large job.
        options = Options(sequence_length=arguments.sequence, val_tokens=None, piece_bytes=1 << 20)
        start = time.perf_counter()
        prepare(
            work / kind,
            out,
            tokenizer=work / "tokenizer",
            options=options,
            workers=arguments.cores,
        )
        return {"seconds": time.perf_counter() - start, **measure_shards(out, arguments.sequence)}


def run_llmfoundry(arguments: argparse.Namespace, work: Path, kind: str) -> dict[str, float]:
    """llm-foundry's converter: seconds, tokens in its shards, and their bytes."""
    from llmfoundry.command_utils.data_prep.convert_dataset_json import convert_dataset_json

    with tempfile.TemporaryDirectory(dir=work) as folder:
        os.environ["HF_DATASETS_CACHE"] = folder  # else the second run finds the first one's
        import datasets

        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        out = Path(folder) / "out"
        start = time.perf_counter()
        convert_dataset_json(
            path=str(work / f"{kind}-flat"),
            out_root=str(out),
            compression=None,
            concat_tokens=arguments.sequence,
            split="train",
            tokenizer=str(work / "tokenizer"),
            eos_text=EOS,
        )
        return {"seconds": time.perf_counter() - start, **measure_shards(out, arguments.sequence)}


def run_floor(
    arguments: argparse.Namespace, work: Path, kind: str, is_fast: bool = False
) -> dict[str, float]:
    """The tokenizer alone on texts in memory: seconds and tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    encode = tokenizer.encode_batch_fast if is_fast else tokenizer.encode_batch
    batches, batch, characters = [], [], 0
    for path in sorted((work / kind).rglob("*.jsonl")):
        for line in path.read_text().splitlines():
            text = json.loads(line)["text"]
            batch.append(text)
            characters += len(text)
            if characters >= BATCH_CHARACTERS:
                batches.append(batch)
                batch, characters = [], 0
    batches.append(batch)
    start = time.perf_counter()
    tokens = sum(len(e) for batch in batches for e in encode(batch, add_special_tokens=False))
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def run_fast_floor(arguments: argparse.Namespace, work: Path, kind: str) -> dict[str, float]:
    """The same with `encode_batch_fast`, which leaves out the offsets as our pipeline does."""
    return run_floor(arguments, work, kind, is_fast=True)


SIDES = {
    "ours": run_ours,
    "llm-foundry": run_llmfoundry,
    "encode_batch": run_floor,
    "encode_batch_fast": run_fast_floor,
}


def measure_shards(out: Path, sequence: int) -> dict[str, float]:
    """Count the tokens and bytes of all MDS shards below a folder."""
    tokens = size = 0
    for index in out.rglob("index.json"):
        shards = json.loads(index.read_text())["shards"]
        if all((index.parent / shard["raw_data"]["basename"]).is_file() for shard in shards):
            tokens += sequence * sum(shard["samples"] for shard in shards)
            size += sum(shard["raw_data"]["bytes"] for shard in shards)
    return {"tokens": tokens, "bytes": size}


def measure(arguments: argparse.Namespace, side: str, work: Path) -> dict[str, float]:
    """Measure one side in a process of its own, with start-up subtracted."""
    command = [sys.executable, __file__, "--side", side, "--work", str(work)]
    for name in ("sequence", "cores"):
        command += [f"--{name}", str(getattr(arguments, name))]
    environment = os.environ | {
        "RAYON_NUM_THREADS": str(arguments.cores),
        "TOKENIZERS_PARALLELISM": "true",
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{side} failed:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def measure_here(arguments: argparse.Namespace) -> dict[str, float]:
    """The work of such a process: on a few documents per domain, then on all."""
    run = SIDES[arguments.side]
    run(arguments, arguments.work, "few")  # imports, which the next two do not repeat
    begin = core_seconds()
    small = run(arguments, arguments.work, "few")
    again = run(arguments, arguments.work, "few")
    small["seconds"] = min(small["seconds"], again["seconds"])
    end = core_seconds()
    result = run(arguments, arguments.work, "all")
    tokens = result["tokens"] - small["tokens"]
    result["startup"] = small["seconds"]
    result["rate"] = tokens / (result["seconds"] - small["seconds"])
    result["core_rate"] = tokens / (core_seconds() - end - (end - begin) / 2)
    return result


def core_seconds() -> float:
    """Seconds of computing so far, of this process and of those that it has ended."""
    return sum(os.times()[:4])


def report(measured: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Rates, and the ratios of measurements of the same round with their spread."""
    found: dict[str, dict[str, float]] = {}
    for side, results in measured.items():
        rates = [result["rate"] for result in results]
        found[side] = {"tokens_per_second": statistics.median(rates), **spread(rates)}
        cores = [result["core_rate"] for result in results]
        found[side]["tokens_per_core_second"] = statistics.median(cores)
        if "bytes" in results[0]:
            found[side]["bytes_per_token"] = results[0]["bytes"] / results[0]["tokens"]
    ours = [result["rate"] for result in measured["ours"]]
    for side in list(SIDES)[1:]:
        theirs = [result["rate"] for result in measured[side]]
        pairs = zip(ours, theirs, strict=True)
        ratios = [a / b if side == "llm-foundry" else b / a for a, b in pairs]
        name = "speedup over" if side == "llm-foundry" else "overhead over"
        found[f"{name} {side}"] = {"ratio": statistics.median(ratios), **spread(ratios)}
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
        names = ("tokens_per_second", "least", "most", "tokens_per_core_second")
        rate, least, most, core = (row[key] / 1e6 for key in names)
        spent = f"{core:.3f} per core-second"
        print(f"{name:32} {rate:10.3f}  ({least:.3f} to {most:.3f}) M tok/s  {spent}{disk}")


def main() -> int:
    """Measure, print, and compare with the bounds."""
    arguments = parse_arguments()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    if arguments.side:
        print(json.dumps(measure_here(arguments)))
        return 0
    measured: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="prep-throughput-") as folder:
        write_inputs(arguments, Path(folder))
        with tqdm(total=arguments.repeats * len(SIDES), unit="run") as bar:
            for _ in range(arguments.repeats):
                for side, results in measured.items():
                    bar.set_description(side)
                    results.append(measure(arguments, side, Path(folder)))
                    bar.update()
    found = report(measured)
    show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps({"summary": found, "runs": measured}, indent=2) + "\n")
    fast_enough = found["speedup over llm-foundry"]["ratio"] >= arguments.least_speedup
    lean_enough = found["overhead over encode_batch"]["ratio"] <= arguments.most_overhead
    return 0 if fast_enough and lean_enough else 1


if __name__ == "__main__":
    sys.exit(main())
