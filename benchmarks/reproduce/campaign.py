"""Does expansion pay, where, and against what? One protocol in three sizes.

A base model is trained once; all arms go on from it, each with several seeds that decide the order
of the data, the same for all arms. What is done already is not done again.

    python benchmarks/reproduce/campaign.py cpu
    python benchmarks/reproduce/campaign.py cpu --study main --budget 3600
    python benchmarks/reproduce/campaign.py gpu --texts shards --out gpu.jsonl
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path += [str(BENCHMARKS), str(BENCHMARKS / "gpu")]

import checkout  # noqa: E402

checkout.activate()

import torch  # noqa: E402
from machine import describe, processor  # noqa: E402
from reproduce.alone import alone_in  # noqa: E402
from reproduce.bases import KINDS, Base, chosen, get_base  # noqa: E402
from reproduce.jobs import jobs_of  # noqa: E402
from reproduce.model import BatchOrder  # noqa: E402
from reproduce.records import (  # noqa: E402
    Record,
    as_json,
    diverged_file,
    done,
    key,
    protocol,
    read,
)
from reproduce.runs import Job, Settings, run_jobs  # noqa: E402
from reproduce.scales import SCALES, Scale  # noqa: E402
from reproduce.studies import studies  # noqa: E402
from reproduce.texts import Texts, load, own_pages, pages_hash, prepare, prepare_small, windows  # noqa: E402

ROOT = checkout.ROOT


def expected_key(job: Job, scale: Scale, texts: Texts, base: Base) -> tuple[Any, ...]:
    """The key of a job's last result, which is written behind that of an average."""
    return key(
        {
            "texts": texts.hash, "base": base.hash, "arm": job.arm.name, "seed": job.seed,
            "scale": protocol(scale), "settings": as_json(job.arm.facts()),
        }
    )  # fmt: skip


def check_texts(jobs: Sequence[Job], scale: Scale, texts: Texts) -> None:
    """Refuse, before a base takes its time, what a run could not read or do.

    Raises:
        ValueError: a domain is missing or too short, or an arm has too many stages.
    """
    length, device = scale.sizes.length, torch.device("cpu")
    windows(texts, "held_out", length)
    for name in dict.fromkeys(job.arm.base for job in jobs):
        kind = KINDS[name]
        if kind.batches:
            own = windows(chosen(texts, kind.domains), "base", round(kind.length * length))
            BatchOrder(own, round(scale.batch / kind.length), 0, device)
        own = windows(chosen(texts, kind.continued), "continued", length)
        BatchOrder(own, scale.batch, 0, device)
    for job in jobs:
        job.arm.stage_ends(scale)


def prepare_texts(scale: Scale, data: Path | None, folder: Path) -> None:
    """The text of a scale in its folder, unless it is there."""
    if scale.text is None:
        if data is not None:
            raise SystemExit(
                f"--data: the scale {scale.name} reads the pages of this repository alone. Allowed "
                "with cpu and gpu"
            )
        prepare_small(folder)
        return
    prepare(folder, data, **vars(scale.text))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scale", choices=list(SCALES), help="size of the protocol")
    parser.add_argument("--study", nargs="+", choices=studies(), default=["main"])
    parser.add_argument("--arms", nargs="+", help="only these; default all of the studies")
    parser.add_argument("--seeds", type=int, help="of every arm at most; default the scale's")
    parser.add_argument("--data", type=Path, help="RedPajama-format text; default installed text")
    parser.add_argument("--texts", type=Path, help="folder of prepared text, made if missing")
    parser.add_argument("--folder", type=Path, help="of bases; default runs/reproduce/<scale>")
    parser.add_argument("--out", type=Path, help="results; default benchmarks/results/...jsonl")
    parser.add_argument(
        "--budget", type=float, help="seconds after which no run is begun, the base's included"
    )
    parser.add_argument("--commit", help="where the checkout is not a git repository")
    return parser.parse_args(arguments)


def command(options: argparse.Namespace) -> str:
    """What makes the same results elsewhere: without this machine's folders."""
    parts = ["python benchmarks/reproduce/campaign.py", options.scale, "--study", *options.study]
    parts += ["--arms", *options.arms] if options.arms else []
    parts += ["--seeds", str(options.seeds)] if options.seeds is not None else []
    return " ".join([*parts, *(["--data", options.data.name] if options.data else [])])


def machine(scale: Scale, commit: str | None) -> dict[str, Any]:
    """What a result depends on besides the code; a CPU by its model and what runs on it."""
    found = describe(torch.device(scale.device), commit)
    if scale.device == "cpu":
        found |= {"device": processor(), "cores": os.cpu_count(), "threads": 1}
    return found | {"workers": scale.workers}


def estimate(jobs: Sequence[Job], scale: Scale, device: str, results: Sequence[Record]) -> str:
    """How long these runs will take: by earlier ones of this machine, or as it was elsewhere."""
    speeds = [
        record["seconds"] / record["stage_ends"][-1]
        for record in results
        if record["scale"]["name"] == scale.name and record["machine"]["device"] == device
    ]
    batches = sum(job.arm.stage_ends(scale)[-1] for job in jobs)
    text = f"{scale.name}: {len(jobs)} runs of {batches:,} batches are to be done"
    if not speeds:
        return f"{text}; the main comparison took {scale.duration}"
    minutes = batches * statistics.median(speeds) / scale.workers / 60
    return f"{text}, about {minutes:.0f} minutes by earlier ones"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare, train the base, run what is missing; 1 where a run is left over, or failed."""
    options, start = parse(arguments), time.monotonic()
    deadline = None if options.budget is None else start + options.budget
    scale = SCALES[options.scale]
    if scale.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"scale: {scale.name} needs a CUDA device, and torch sees none here")
    if scale.workers == 1:  # several threads gain nothing on models this small
        torch.set_num_threads(1)
    if scale.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True  # as Composer sets it for the whole process
    folder = options.folder or ROOT / "runs" / "reproduce" / scale.name
    if options.seeds is not None and options.seeds < 1:
        raise SystemExit(f"--seeds: got {options.seeds}, allowed: 1 or more")
    jobs = jobs_of(scale, options.study, options.arms, options.seeds)
    with alone_in(folder):
        return run_missing(jobs, scale, folder, deadline, options)


def results_file(scale: Scale, folder: Path) -> Path:
    """Beside the others, to be committed; of the smallest scale, no evidence, in its folder."""
    if scale.text is None:
        return folder / "results.jsonl"
    return ROOT / "benchmarks" / "results" / f"reproduce-{scale.name}.jsonl"


def run_missing(
    jobs: Sequence[Job],
    scale: Scale,
    folder: Path,
    deadline: float | None,
    options: argparse.Namespace,
) -> int:
    """Those of a campaign that have no result yet."""
    # Pages change with the checkout, and texts that results name are not replaced.
    name = "texts" if scale.text else f"texts-{pages_hash(own_pages())[:12]}"
    texts_folder = options.texts or folder / name
    out = options.out or results_file(scale, folder)
    if options.texts is None or options.data is not None or not texts_folder.exists():
        prepare_texts(scale, options.data, texts_folder)
    texts, results = load(texts_folder), read(out)
    check_texts(jobs, scale, texts)
    facts = {
        "command": command(options), "machine": machine(scale, options.commit),
        "texts_facts": texts.facts,
    }  # fmt: skip
    if not results:
        print(estimate(jobs, scale, facts["machine"]["device"], results))
    bases = {
        name: get_base(name, scale, texts, folder, torch.device(scale.device))
        for name in dict.fromkeys(job.arm.base for job in jobs)
    }
    known = done(results) | done(read(diverged_file(out)))
    missing = [
        job for job in jobs if expected_key(job, scale, texts, bases[job.arm.base]) not in known
    ]
    if missing and results:
        print(estimate(missing, scale, facts["machine"]["device"], results))
    left = run_jobs(missing, Settings(scale, texts_folder, folder, facts, deadline), out)
    print(f"{len(jobs) - left} of {len(jobs)} runs are done, results in {out}")
    for record in read(diverged_file(out)):
        print(f"no result of {record['arm']} {record['seed']}: {record['diverged']}")
    return int(left > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: all results so far are kept, the same command goes on")
