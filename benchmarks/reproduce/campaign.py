"""Does expansion pay, where, and against what? One protocol in three sizes.

A base model is trained once; all arms go on from it, each with several seeds that decide the order
of the data, the same for all arms. What is done already is not done again.

    python benchmarks/reproduce/campaign.py cpu
    python benchmarks/reproduce/campaign.py cpu --study main --budget 3600
    python benchmarks/reproduce/campaign.py gpu --texts shards --out gpu.jsonl
"""

import argparse
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
from machine import describe  # noqa: E402
from reproduce.bases import Base, get_base  # noqa: E402
from reproduce.records import as_json, diverged_file, done, key, protocol, read  # noqa: E402
from reproduce.runs import Job, Settings, run_jobs  # noqa: E402
from reproduce.scales import SCALES, Scale  # noqa: E402
from reproduce.studies import arms_of, studies  # noqa: E402
from reproduce.texts import Texts, load, prepare, prepare_small  # noqa: E402

ROOT = checkout.ROOT


def expected_key(job: Job, scale: Scale, texts: Texts, base: Base) -> tuple[Any, ...]:
    """The key of a job's result."""
    return key(
        {
            "texts": texts.hash, "base": base.hash, "arm": job.arm.name, "seed": job.seed,
            "scale": protocol(scale), "settings": as_json(job.arm.facts()),
        }
    )  # fmt: skip


def jobs_of(scale: Scale, chosen: Sequence[str], names: Sequence[str] | None = None) -> list[Job]:
    """All runs of some studies: every arm's first seed, then every arm's second, and so on.

    Args:
        scale: its numbers of seeds.
        chosen: names of studies.
        names: of arms; default all.

    Raises:
        SystemExit: where a study has no such arm.
    """
    known = [arm.name for study in chosen for arm in arms_of(study)]
    if unknown := sorted(set(names or ()) - set(known)):
        raise SystemExit(f"--arms: {', '.join(unknown)} is none of {', '.join(known)}")
    jobs = [
        Job(arm, seed)
        for study in chosen
        for arm in arms_of(study)
        for seed in arm.seeds(scale)
        if names is None or arm.name in names
    ]
    return sorted(
        jobs, key=lambda job: (chosen.index(job.arm.study), job.seed - job.arm.first_seed)
    )


def prepare_texts(scale: Scale, data: Path | None, folder: Path) -> None:
    """The text of a scale in its folder, unless it is there."""
    if scale.text is None:
        prepare_small(folder)
        return
    prepare(folder, data, **vars(scale.text))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scale", choices=list(SCALES), help="size of the protocol")
    parser.add_argument("--study", nargs="+", choices=studies(), default=["main"])
    parser.add_argument("--arms", nargs="+", help="only these; default all of the studies")
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
    return " ".join([*parts, *(["--data", options.data.name] if options.data else [])])


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare, train the base, run what is missing; 1 where the time did not suffice."""
    options, start = parse(arguments), time.monotonic()
    deadline = None if options.budget is None else start + options.budget
    scale = SCALES[options.scale]
    if scale.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"scale: {scale.name} needs a CUDA device, and torch sees none here")
    device = torch.device(scale.device)
    if scale.workers == 1:  # several threads gain nothing on models this small
        torch.set_num_threads(1)
    if scale.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True  # as Composer sets it for the whole process
    folder = options.folder or ROOT / "runs" / "reproduce" / scale.name
    texts_folder = options.texts or folder / "texts"
    out = options.out or ROOT / "benchmarks" / "results" / f"reproduce-{scale.name}.jsonl"
    if options.texts is None or not texts_folder.exists():
        prepare_texts(scale, options.data, texts_folder)
    texts = load(texts_folder)
    jobs = jobs_of(scale, options.study, options.arms)
    bases = {
        name: get_base(name, scale, texts, folder, device)
        for name in dict.fromkeys(job.arm.base for job in jobs)
    }
    known = done(read(out)) | done(read(diverged_file(out)))
    missing = [
        job for job in jobs if expected_key(job, scale, texts, bases[job.arm.base]) not in known
    ]
    facts = {
        "command": command(options),
        "machine": describe(device, options.commit), "texts_facts": texts.facts,
    }  # fmt: skip
    settings = Settings(scale, texts_folder, folder, facts, deadline)
    left = run_jobs(missing, settings, out)
    print(f"{len(jobs) - left} of {len(jobs)} runs are done, results in {out}")
    for record in read(diverged_file(out)):
        print(f"no result of {record['arm']} {record['seed']}: {record['diverged']}")
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())
