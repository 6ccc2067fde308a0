"""The plan of a preparation: all that decides its bytes, written before the first piece."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from apex_composer.data_prep.atomic_files import read_json, write_json
from apex_composer.data_prep.choose.budgets import (
    HOPELESS,
    check_budgets,
    check_enough,
    parts_for_budgets,
    wanted_tokens,
)
from apex_composer.data_prep.choose.estimate import estimate_domains, take_samples
from apex_composer.data_prep.errors import SettingsError
from apex_composer.data_prep.options import Options, read_options
from apex_composer.data_prep.paths import PLAN
from apex_composer.data_prep.read.sources import Source
from apex_composer.data_prep.tokens.document_hash import FIRST_HASH, HASH_WORDS, NEWEST_HASH
from apex_composer.data_prep.tokens.tokenizer import TokenizerFacts

FORMAT = "apex-composer plan 3"
# It is read too: it names no hash, and is that of a job under the first one.
FORMAT_OF_FIRST_HASH = "apex-composer plan 2"


class PieceSpan(NamedTuple):
    """A part of the input that one worker reads.

    Args:
        source: index of the file.
        start: first byte.
        stop: byte after the last, None for the file's end.
    """

    source: int
    start: int
    stop: int | None


@dataclass(frozen=True)
class DatedSource(Source):
    """An input file as it was when the preparation began.

    Args:
        modified_ns: time of its last change; None where a store does not tell.
    """

    modified_ns: int | None


@dataclass(frozen=True)
class Plan:
    """What `.work/plan.json` holds.

    Args:
        options: what shall be done.
        tokenizer: the one that is used.
        sources: files of the input, sorted.
        pieces: parts of the input, in its order.
        kept: part of every domain's documents that is tokenised; 1 for a domain that it lacks.
        document_hash: name of the hash of the documents.
        format: version of this content. Default: FORMAT.
    """

    options: Options
    tokenizer: TokenizerFacts
    sources: list[DatedSource]
    pieces: list[PieceSpan]
    kept: dict[str, float]
    document_hash: str
    format: str = FORMAT


def make_plan(
    sources: list[Source], options: Options, tokenizer: TokenizerFacts, tokenizer_file: Path
) -> Plan:
    """Cut the input into pieces and choose how much of every domain is tokenised.

    Args:
        tokenizer_file: its `tokenizer.json`.

    Raises:
        SettingsError: a budget is too small for a sequence of some domain.
        ValueError: by the estimate a domain has far too little text for its budgets.
    """
    kept: dict[str, float] = {}
    if not options.takes_all:
        estimates = estimate_domains(take_samples(sources), tokenizer_file)
        check_budgets(options, list(estimates))
        check_enough(wanted_tokens(options, list(estimates)), estimates, HOPELESS)
        kept = parts_for_budgets(estimates, options)
    pieces = make_pieces(sources, options.piece_bytes)
    dated = [date_source(source) for source in sources]
    return Plan(options, tokenizer, dated, pieces, kept, NEWEST_HASH)


def make_pieces(sources: list[Source], piece_bytes: int) -> list[PieceSpan]:
    """Cut files that can be cut into byte ranges; every other file is one piece.

    Args:
        piece_bytes: size of a range.
    """
    pieces = []
    for index, source in enumerate(sources):
        step = piece_bytes if source.splittable else max(1, source.bytes)
        starts = range(0, source.bytes, step) or [0]
        pieces += [PieceSpan(index, start, start + step) for start in starts]
        pieces[-1] = PieceSpan(index, starts[-1], None)  # also what the file may have gained since
    return pieces


def date_source(source: Source) -> DatedSource:
    """Note the time of a file's last change."""
    modified = os.stat(source.path).st_mtime_ns if os.path.exists(source.path) else None
    return DatedSource(**asdict(source), modified_ns=modified)


def read_plan(out: Path) -> Plan | None:
    """Read the plan of an unfinished preparation, or None where there is none.

    Raises:
        SettingsError: another version wrote it.
    """
    content = read_json(out / PLAN)
    if content is None:
        return None
    format, name = content.get("format"), content.get("document_hash")
    if format == FORMAT_OF_FIRST_HASH:
        format, name = FORMAT, FIRST_HASH
    if format != FORMAT or name not in HASH_WORDS:
        raise SettingsError(
            f"out={str(out)!r} was begun by another version ({format!r}, document_hash {name!r}; "
            f"this one writes {FORMAT!r}, {NEWEST_HASH!r}). Finish it with that one, or start over "
            "with --overwrite."
        )
    return Plan(
        read_options(content["options"]),
        TokenizerFacts(**content["tokenizer"]),
        [DatedSource(**source) for source in content["sources"]],
        [PieceSpan(*piece) for piece in content["pieces"]],
        content["kept"],
        name,
    )


def write_plan(out: Path, plan: Plan) -> None:
    """Write the plan."""
    write_json(out / PLAN, asdict(plan))


def check_same(
    earlier: Mapping[str, Any],
    options: Options,
    sources: list[Source],
    tokenizer: TokenizerFacts,
    out: Path,
) -> None:
    """Refuse to continue a preparation with other options or inputs.

    Args:
        earlier: content of the plan of the preparation that was begun, or of its manifest.
        options: those that are given now.
        sources: files that are there now.
        tokenizer: the one that is given now.

    Raises:
        SettingsError: an option, the tokenizer or a source differs; the message names the first.
    """
    before, now = read_options(earlier["options"]).identity(), options.identity()
    differences = [
        f"{name} was {before[name]!r} and is now {value!r}"
        for name, value in now.items()
        if before[name] != value
    ]
    old = earlier["tokenizer"]
    if old["sha256"] != tokenizer.sha256:
        differences.append(f"the tokenizer was {old['name']!r} of other content")
    differences += [
        f"the tokenizer's {name} was {old[name]} and is now {getattr(tokenizer, name)}"
        for name in ("vocabulary_size", "bos", "eos")
        if old[name] != getattr(tokenizer, name)
    ]
    # A manifest says more of a source than a plan does.
    names = [field.name for field in fields(DatedSource)]
    dated = [DatedSource(**{name: old[name] for name in names}) for old in earlier["sources"]]
    differences += source_differences(dated, sources)
    if differences:
        raise SettingsError(
            f"out={str(out)!r} holds a preparation of other input: {'; '.join(differences[:5])}. "
            "Give the same again, another --out, or --overwrite to start over."
        )


def source_differences(before: list[DatedSource], sources: list[Source]) -> list[str]:
    """Say how the input differs from that of an earlier moment.

    Args:
        before: files of a plan.
        sources: files as they are now.
    """
    old = {source.path: source for source in before}
    new = {source.path: date_source(source) for source in sources}
    gone = [f"{path} is gone" for path in old if path not in new]
    added = [f"{path} is new" for path in new if path not in old]
    changed = [f"{path} has changed" for path in new if path in old and old[path] != new[path]]
    return gone + added + changed
