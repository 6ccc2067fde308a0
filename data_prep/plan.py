"""The plan of a preparation: all that decides its bytes, written before the first piece."""

import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apex_composer.data_prep.estimate import Estimate, estimate_domains, take_samples
from apex_composer.data_prep.files import read_json, write_json
from apex_composer.data_prep.options import Options, SettingsError
from apex_composer.data_prep.proportions import share_out
from apex_composer.data_prep.readers import Source
from apex_composer.data_prep.selection import HASHES, divide_sequences

WORK = ".work"
PLAN = "plan.json"
PIECES = "pieces"
FORMAT = "apex-composer plan 1"
# Above this part of the corpus the rest is not worth leaving out.
LARGEST_PART = 0.6
# Standard deviations of the number of documents that are kept beyond the expected ones.
SCATTER = 6

Plan = dict[str, Any]


def make_plan(
    sources: list[Source], options: Options, tokenizer: dict[str, Any], tokenizer_file: Path
) -> Plan:
    """Cut the input into pieces and choose how much of every domain is tokenised.

    Args:
        sources: input files, sorted.
        options: of the preparation.
        tokenizer: as `load_tokenizer` returns it.
        tokenizer_file: its `tokenizer.json`.
    """
    kept: dict[str, float] = {}
    if not options.takes_all:
        estimates = estimate_domains(take_samples(sources), tokenizer_file)
        kept = parts_for_budgets(estimates, options)
    elif options.text_limit is not None:
        kept = parts_for_limit(estimate_domains(take_samples(sources), None), options.text_limit)
    return {
        "format": FORMAT,
        "options": options.as_dict(),
        "tokenizer": tokenizer,
        "sources": [describe_source(source) for source in sources],
        "kept": kept,
        "pieces": make_pieces(sources, options.piece_bytes),
    }


def make_pieces(sources: list[Source], piece_bytes: int) -> list[list[int | None]]:
    """Cut files that can be cut into byte ranges; every other file is one piece.

    Args:
        sources: input files.
        piece_bytes: size of a range.

    Returns:
        For each piece: index of its source, first byte, and the byte after its last or None.
    """
    pieces: list[list[int | None]] = []
    for index, source in enumerate(sources):
        if not source.splittable or source.bytes <= piece_bytes:
            pieces.append([index, 0, None])
            continue
        starts = range(0, source.bytes, piece_bytes)
        pieces += [[index, start, min(start + piece_bytes, source.bytes)] for start in starts]
        pieces[-1][2] = None  # also what the file may have gained since
    return pieces


def parts_for_budgets(estimates: dict[str, Estimate], options: Options) -> dict[str, float]:
    """Part of every domain's documents that the budgets need, with the margin.

    Args:
        estimates: of the domains.
        options: of the preparation.
    """
    wanted = wanted_tokens(options, list(estimates))
    parts = {}
    for domain, estimate in estimates.items():
        tokens = sum(split[domain] for split in wanted.values() if split is not None)
        part = options.estimate_margin * tokens / max(1.0, estimate.tokens)
        # Few documents scatter around their mean; lengths with a long tail do so widely.
        expected = part * estimate.documents
        part += SCATTER * math.sqrt(expected + 1) / max(1.0, estimate.documents)
        parts[domain] = part if part < LARGEST_PART else 1.0
    return parts


def parts_for_limit(estimates: dict[str, Estimate], text_limit: int) -> dict[str, float]:
    """Part of every domain's documents that a limit of text leaves.

    Args:
        estimates: of the domains.
        text_limit: bytes of text of all domains together.
    """
    limit = text_limit / max(1, len(estimates))
    return {name: min(1.0, limit / max(1.0, e.text_bytes)) for name, e in estimates.items()}


def wanted_tokens(options: Options, domains: list[str]) -> dict[str, dict[str, int] | None]:
    """Tokens of every budget, whole sequences only, in the order in which the hashes fill them.

    Args:
        options: of the preparation, with budgets.
        domains: names of the domains, sorted.

    Returns:
        Per split: tokens per domain, or None for a split that takes all that is left.

    Raises:
        SettingsError: a domain has no proportion.
    """
    budgets = {
        "validation": options.val_tokens,
        "train": options.train_tokens,
        "cpt": options.cpt_tokens,
    }
    shares, _ = share_out(options.proportions, domains)
    length = options.sequence_length
    wanted: dict[str, dict[str, int] | None] = {}
    for name in options.splits:
        budget = budgets[name]
        if budget is None:
            wanted[name] = None
        elif name == "validation" and options.val_per_domain:
            wanted[name] = dict.fromkeys(domains, budget // length * length)
        else:
            counts = divide_sequences(budget // length, shares)
            wanted[name] = {domain: count * length for domain, count in counts.items()}
    return wanted


def hash_limit(kept: dict[str, float], domain: str) -> int:
    """First hash that is not tokenised; a domain that no sample showed is tokenised whole.

    Args:
        kept: parts of the domains that are tokenised.
        domain: name of the domain.
    """
    return round(kept.get(domain, 1.0) * HASHES)


def describe_source(source: Source) -> dict[str, Any]:
    """A source as JSON holds it, with the time of its last change.

    Args:
        source: input file.
    """
    modified = os.stat(source.path).st_mtime_ns if os.path.exists(source.path) else None
    return asdict(source) | {"modified_ns": modified}


def read_source(description: dict[str, Any]) -> Source:
    """Make a source from its description.

    Args:
        description: as `describe_source` returns it.
    """
    return Source(**{key: value for key, value in description.items() if key != "modified_ns"})


def read_plan(out: Path) -> Plan | None:
    """Read the plan of an unfinished preparation, or None where there is none.

    Args:
        out: output folder.
    """
    return read_json(out / WORK / PLAN)


def write_plan(out: Path, plan: Plan) -> None:
    """Write the plan.

    Args:
        out: output folder.
        plan: from `make_plan`.
    """
    write_json(out / WORK / PLAN, plan)


def check_same(
    plan: Plan, options: Options, sources: list[Source], tokenizer: dict[str, Any], out: Path
) -> None:
    """Refuse to continue a preparation with other options or inputs.

    Args:
        plan: of the preparation that was begun, or its manifest.
        options: now given.
        sources: now found.
        tokenizer: now given.
        out: output folder, for the message.

    Raises:
        SettingsError: an option, the tokenizer or a source differs; the message names the first.
    """
    differences = [
        f"{name} was {plan['options'].get(name)!r} and is now {value!r}"
        for name, value in options.identity().items()
        if plan["options"].get(name) != value
    ]
    if plan["tokenizer"]["sha256"] != tokenizer["sha256"]:
        differences.append(f"the tokenizer was {plan['tokenizer']['name']!r} of other content")
    differences += source_differences(plan["sources"], [describe_source(s) for s in sources])
    if differences:
        raise SettingsError(
            f"out={str(out)!r} holds a preparation of other input: {'; '.join(differences[:5])}. "
            "Give the same again, another --out, or --overwrite to start over."
        )


def source_differences(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    """Say how the input differs from that of an earlier run.

    Args:
        before: sources of a plan or a manifest.
        now: as `describe_source` returns them.
    """
    old, new = ({entry["path"]: entry for entry in entries} for entries in (before, now))
    gone = [f"{path} is gone" for path in old if path not in new]
    added = [f"{path} is new" for path in new if path not in old]
    # A manifest says more of a source than a plan does.
    changed = [
        f"{path} has changed"
        for path in new
        if path in old and any(old[path][key] != value for key, value in new[path].items())
    ]
    return gone + added + changed
