"""The plan of a preparation: all that decides its bytes, written before the first piece."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apex_composer.data_prep.atomic_files import read_json, write_json
from apex_composer.data_prep.choose.budgets import (
    check_budgets,
    check_enough,
    parts_for_budgets,
)
from apex_composer.data_prep.choose.estimate import estimate_domains, take_samples
from apex_composer.data_prep.choose.splits import HASHES
from apex_composer.data_prep.errors import SettingsError
from apex_composer.data_prep.options import Options, read_options
from apex_composer.data_prep.paths import PLAN
from apex_composer.data_prep.read.sources import Source

FORMAT = "apex-composer plan 2"

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

    Raises:
        SettingsError: a budget is too small for a sequence of some domain.
        ValueError: by the estimate a domain has far too little text for its budgets.
    """
    kept: dict[str, float] = {}
    if not options.takes_all:
        estimates = estimate_domains(take_samples(sources), tokenizer_file)
        check_budgets(options, list(estimates))
        check_enough(estimates, options)
        kept = parts_for_budgets(estimates, options)
    return {
        "format": FORMAT,
        "options": options.as_dict(),
        "tokenizer": tokenizer,
        "sources": [describe_source(source) for source in sources],
        "pieces": make_pieces(sources, options.piece_bytes),
        "kept": kept,
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

    Raises:
        SettingsError: another version wrote it.
    """
    plan = read_json(out / PLAN)
    if plan is not None and plan.get("format") != FORMAT:
        raise SettingsError(
            f"out={str(out)!r} was begun by another version ({plan.get('format')!r}, this one "
            f"writes {FORMAT!r}). Finish it with that one, or start over with --overwrite."
        )
    return plan


def write_plan(out: Path, plan: Plan) -> None:
    """Write the plan.

    Args:
        out: output folder.
        plan: from `make_plan`.
    """
    write_json(out / PLAN, plan)


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
    before = read_options(plan["options"]).identity()
    differences = [
        f"{name} was {before[name]!r} and is now {value!r}"
        for name, value in options.identity().items()
        if before[name] != value
    ]
    if plan["tokenizer"]["sha256"] != tokenizer["sha256"]:
        differences.append(f"the tokenizer was {plan['tokenizer']['name']!r} of other content")
    differences += [
        f"the tokenizer's {name} was {plan['tokenizer'][name]} and is now {tokenizer[name]}"
        for name in ("vocabulary_size", "bos", "eos")
        if plan["tokenizer"][name] != tokenizer[name]
    ]
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
