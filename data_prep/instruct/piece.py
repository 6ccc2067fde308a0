"""A worker turns one piece of the input into examples of each split, and rejects, on disk."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from apex_composer.data_prep.atomic_files import new_folder
from apex_composer.data_prep.instruct.chat_template import read_chat_tokenizer
from apex_composer.data_prep.instruct.options import SPLIT_FILES, InstructOptions
from apex_composer.data_prep.instruct.records import UNNAMED, Conversation, take_conversation
from apex_composer.data_prep.instruct.tokenise import Length, measure
from apex_composer.data_prep.paths import REJECTS, REPORT, TOKENIZER_FOLDER, piece_folder
from apex_composer.data_prep.read.documents import OnReject, read_records
from apex_composer.data_prep.read.sources import Source
from apex_composer.data_prep.tokens.document_hash import HASHES, hash_text

# Between two messages to the progress bar.
EXAMPLES_AT_ONCE = 100
COUNTED = ("kinds", "splits", "lengths", "rejects")
PROGRESS = ("documents", "tokens", "characters")

# Numbers by name; those of splits, sources, lengths and reasons stand one in the other.
Counts = dict[str, Any]
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class ExamplesTask:
    """What a worker needs to know of a piece.

    Args:
        out: output folder, which has the tokenizer.
        number: place among the pieces, from 0.
        source: file to read.
        start: first byte.
        stop: byte after the last, None for the file's end.
        options: those of the preparation.
    """

    out: Path
    number: int
    source: Source
    start: int
    stop: int | None
    options: InstructOptions

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.source.path} from byte {self.start}"


@dataclass
class ExamplesReport:
    """What has been read of a piece; `report.json` of a finished one holds it.

    Args:
        source: path of the file.
        documents: examples. Default: 0.
        tokens: those of all examples. Default: 0.
        characters: bytes of the lines, decompressed. Default: 0.
        lines: number of them, blank ones and rejects too. Default: 0.
        counts: what the manifest says of all pieces together. Default: none of anything.
    """

    source: str
    documents: int = 0
    tokens: int = 0
    characters: int = 0
    lines: int = 0
    counts: Counts = field(default_factory=lambda: {name: {} for name in COUNTED})

    @property
    def rejected(self) -> int:
        """Bad records of all sources."""
        return sum(sum(reasons.values()) for reasons in self.counts["rejects"].values())


def add_counts(total: Counts, found: Counts) -> Counts:
    """Add numbers, by name and at any depth, to others; of `longest` the larger one stays."""
    for name, value in found.items():
        if isinstance(value, dict):
            add_counts(total.setdefault(name, {}), value)
        else:
            before = total.get(name, 0)
            total[name] = max(before, value) if name == "longest" else before + value
    return total


def count_example(split: str, source: str, length: Length) -> Counts:
    """The counts of one example: in its split and source, and by its length up to a power of 2."""
    bound = str(1 << (length.tokens - 1).bit_length())
    numbers = {"examples": 1, **length._asdict(), "longest": length.tokens}
    return {"splits": {split: {source: numbers}}, "lengths": {split: {bound: 1}}}


def choose_split(line: str, share: float) -> str:
    """The split of an example: by its hash alone, so that nothing but its own text moves it.

    It is 64 bits of blake2b for good: another hash would move examples that are held out by now.
    """
    return "validation" if hash_text(line) < round(share * HASHES) else "train"


def read_piece(
    task: ExamplesTask,
    report_progress: Progress,
    on_example: Callable[[str, str], None],
    on_reject: OnReject,
) -> ExamplesReport:
    """Read and count the examples of a piece.

    Args:
        report_progress: called now and then with the counts since the last time.
        on_example: called with the split and the line of every example.
        on_reject: as that of `read_records`.

    Raises:
        SourceError: the input cannot be read.
    """
    options, report = task.options, ExamplesReport(task.source.path)
    tokenizer = read_chat_tokenizer(str(task.out / TOKENIZER_FOLDER))
    told = dict.fromkeys(PROGRESS, 0)

    def take(record: dict[str, Any]) -> tuple[Conversation, Length]:
        conversation = take_conversation(record)
        return conversation, measure(conversation, tokenizer, options.sequence_length)

    def reject(line: int, reason: str, excerpt: str, source: str | None) -> None:
        add_counts(report.counts, {"rejects": {source or UNNAMED: {reason: 1}}})
        on_reject(line, reason, excerpt, source or UNNAMED)

    def tell() -> None:
        counts = {name: getattr(report, name) for name in told}
        report_progress({n: counts[n] - told[n] for n in told} | {"source": report.source})
        told.update(counts)

    def end(lines: int) -> None:
        report.lines = lines

    records = read_records(task.source, task.start, task.stop, take, reject, on_end=end)
    for _, (conversation, length), stop in records:
        line = conversation.line
        split = choose_split(line, options.validation_share)
        add_counts(report.counts, count_example(split, conversation.source, length))
        add_counts(report.counts, {"kinds": {conversation.kind: 1}})
        report.documents, report.tokens = report.documents + 1, report.tokens + length.tokens
        report.characters = stop - task.start
        on_example(split, line)
        if report.documents % EXAMPLES_AT_ONCE == 0:
            tell()
    tell()
    return report


def write_piece(piece: ExamplesTask, report_progress: Progress) -> ExamplesReport:
    """Write the folder of one piece, whole or not at all.

    Raises:
        SourceError: the input cannot be read.
        DiskFullError: the disk is full.
    """
    with new_folder(piece_folder(piece.out, piece.number)) as partial, ExitStack() as stack:
        names = (*SPLIT_FILES.values(), REJECTS)
        files = {name: stack.enter_context((partial / name).open("wb")) for name in names}

        def keep(split: str, line: str) -> None:
            files[SPLIT_FILES[split]].write(line.encode() + b"\n")

        def reject(line: int, reason: str, excerpt: str, source: str | None) -> None:
            entry = {"file": piece.source.path, "line": line, "reason": reason, "source": source}
            files[REJECTS].write(json.dumps(entry | {"excerpt": excerpt}).encode() + b"\n")

        report = read_piece(piece, report_progress, keep, reject)
        (partial / REPORT).write_text(json.dumps(asdict(report), sort_keys=True) + "\n")
    return report
