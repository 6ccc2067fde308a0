"""What a preparation will need, estimated from samples before it is begun."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.filesize import decimal

from apex_composer.data_prep.choose.budgets import (
    DOUBTFUL,
    check_budgets,
    check_enough,
    parts_for_budgets,
    wanted_tokens,
)
from apex_composer.data_prep.choose.estimate import Estimate, estimate_domains, take_samples
from apex_composer.data_prep.engines.local import check_workers
from apex_composer.data_prep.errors import DiskFullError
from apex_composer.data_prep.options import Options
from apex_composer.data_prep.read.sources import find_sources
from apex_composer.data_prep.tokens.tokenizer import load_tokenizer, token_type
from apex_composer.extras import require

# Reading and hashing documents, most of which are left out: bytes of text per second and core; of
# gzip, the slowest (benchmarks/prep_reading.py).
READING_RATE = 290e6
# Record of one document in phase 1, and of one shard.
DOCUMENT_BYTES = 30
# What zstd leaves of tokens of natural text.
COMPRESSED_PART = 0.8
WARNING = "samples are the beginnings of a few files: expect errors of 10 to 30 %"


@dataclass(frozen=True)
class Needs:
    """What a preparation is expected to need.

    Args:
        domains: what every domain holds.
        kept: part of every domain's documents that is tokenised.
        wanted: tokens per split and domain.
        output_bytes: size of the finished output.
        work_bytes: size of `.work`, which is removed at the end.
        free_bytes: room on the disk of the output.
        hours: duration with the workers given.
    """

    domains: dict[str, Estimate]
    kept: dict[str, float]
    wanted: dict[str, dict[str, int]]
    output_bytes: int
    work_bytes: int
    free_bytes: int
    hours: float


def estimate_preparation(
    input: Path | str,
    out: Path | str,
    *,
    tokenizer: Path | str,
    options: Options | None = None,
    workers: int | None = None,
) -> Needs:
    """Read samples of the input and estimate tokens, disk and time; write nothing.

    Args:
        input: as for `prepare`.
        out: as for `prepare`; need not exist.
        tokenizer: as for `prepare`.
        options: as for `prepare`. Default: Options().
        workers: processes. Default: one for each core.

    Raises:
        As `prepare` before it writes anything.
    """
    require("Data preparation", "prep")
    out, options, workers = Path(out), options or Options(), check_workers(workers)
    sources = find_sources(input, options.format)
    with tempfile.TemporaryDirectory(prefix="apex-prep-") as folder:
        vocabulary = load_tokenizer(str(tokenizer), Path(folder)).vocabulary_size
        estimates = estimate_domains(take_samples(sources), Path(folder) / "tokenizer.json")
    check_budgets(options, list(estimates))
    everything = dict.fromkeys(estimates, 1.0)
    kept = everything if options.takes_all else parts_for_budgets(estimates, options)
    wanted = _wanted(estimates, options)
    size = np.dtype(token_type(vocabulary)).itemsize
    tokenised = {domain: kept[domain] * e.tokens for domain, e in estimates.items()}
    documents = sum(kept[domain] * e.documents for domain, e in estimates.items())
    work = sum(tokenised.values()) * size + documents * DOCUMENT_BYTES
    written = sum(sum(tokens.values()) for tokens in wanted.values())
    output = written * size * (COMPRESSED_PART if options.compression else 1)
    seconds = sum(
        kept[domain] * e.seconds + e.text_bytes / READING_RATE for domain, e in estimates.items()
    )
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    hours = seconds / workers / 3600
    return Needs(estimates, kept, wanted, round(output), round(work), free, hours)


def _wanted(estimates: dict[str, Estimate], options: Options) -> dict[str, dict[str, int]]:
    """Expected tokens per split and domain; what takes the rest takes the rest of the estimate."""
    left = {domain: estimate.tokens for domain, estimate in estimates.items()}
    result = {}
    for name, tokens in wanted_tokens(options, list(estimates)).items():
        result[name] = tokens or {domain: round(max(0, rest)) for domain, rest in left.items()}
        left = {domain: rest - result[name][domain] for domain, rest in left.items()}
    return result


def check_needs(needs: Needs, out: Path) -> None:
    """Refuse a preparation for which there is no room or no text.

    Raises:
        DiskFullError: the disk is too small.
        ValueError: a domain has fewer tokens than its budget.
    """
    wanted = needs.output_bytes + needs.work_bytes
    if wanted > needs.free_bytes:
        raise DiskFullError(
            f"The disk of out={str(out)!r} is too small: {decimal(wanted)} are needed "
            f"({decimal(needs.output_bytes)} stay), {decimal(needs.free_bytes)} are free. "
            "Make room, give another --out, or lower the budgets."
        )
    check_enough(needs.wanted, needs.domains, DOUBTFUL)


def describe_needs(needs: Needs) -> list[str]:
    """Say in lines of text what a preparation will need."""
    lines = [f"{'domain':<16}{'documents':>15}{'text':>11}{'tokens':>18}{'tokenised':>11}"]
    lines[0] += "".join(f"{split:>16}" for split in needs.wanted)
    for domain, estimate in needs.domains.items():
        row = f"{domain:<16}{estimate.documents:>15,.0f}{decimal(round(estimate.text_bytes)):>11}"
        row += f"{estimate.tokens:>18,.0f}{needs.kept[domain]:>11.2%}"
        lines.append(row + "".join(f"{split[domain]:>16,}" for split in needs.wanted.values()))
    return [
        *lines,
        f"disk: {decimal(needs.output_bytes)} of output and {decimal(needs.work_bytes)} "
        f"until it is done; {decimal(needs.free_bytes)} are free",
        f"time: about {show_hours(needs.hours)} on this machine",
        WARNING,
    ]


def show_hours(hours: float) -> str:
    """Write a duration in hours, in minutes below an hour, in seconds below two minutes.

    Args:
        hours: duration.
    """
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:.1f} minutes" if hours > 1 / 30 else f"{3600 * hours:.1f} seconds"
