"""Phase 2: from the pieces' tokens to MDS shards, each written for itself by any worker."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from apex_composer.data_prep import shards
from apex_composer.data_prep.files import read_json, write_bytes, write_json
from apex_composer.data_prep.options import Options
from apex_composer.data_prep.plan import PIECES, WORK, Plan, wanted_tokens
from apex_composer.data_prep.selection import (
    BEYOND,
    DUPLICATE,
    ShortfallError,
    choose_splits,
    make_ranges,
    stream_spans,
)
from apex_composer.data_prep.sequences import token_type
from apex_composer.data_prep.tokenise import DOCUMENTS, REPORT, TOKENS

RECORDS = "shards"


@dataclass
class Corpus:
    """All documents of all pieces, in the order of the input.

    Args:
        domains: names, sorted.
        hashes: uint64 [n].
        lengths: tokens: uint32 [n].
        owners: indices into `domains`: uint16 [n].
        first: number of each piece's first document, and n: int64 [pieces + 1].
        reports: of the pieces.
    """

    domains: list[str]
    hashes: np.ndarray
    lengths: np.ndarray
    owners: np.ndarray
    first: np.ndarray
    reports: list[dict[str, Any]]


def piece_folder(out: Path, number: int) -> Path:
    """Folder of a piece.

    Args:
        out: output folder.
        number: of the piece, from 0.
    """
    return out / WORK / PIECES / f"{number:06d}"


def read_corpus(out: Path, plan: Plan) -> Corpus:
    """Read what phase 1 knows of every document.

    Args:
        out: output folder.
        plan: all of whose pieces exist.
    """
    folders = [piece_folder(out, number) for number in range(len(plan["pieces"]))]
    reports = [read_json(folder / REPORT) for folder in folders]
    domains = sorted({domain for report in reports for domain in report["domains"]})
    numbers = {domain: number for number, domain in enumerate(domains)}
    hashes, lengths, owners, first = [], [], [], [0]
    for folder, report in zip(folders, reports, strict=True):
        documents = np.load(folder / DOCUMENTS)
        names = np.array([numbers[name] for name in report["domains"]] or [0], dtype=np.uint16)
        hashes.append(documents["hash"].copy())  # not views, which would keep the rest alive
        lengths.append(documents["length"].copy())
        owners.append(names[documents["domain"]])
        first.append(first[-1] + len(documents))
    return Corpus(
        domains,
        np.concatenate(hashes),
        np.concatenate(lengths),
        np.concatenate(owners),
        np.array(first),
        reports,
    )


def select(corpus: Corpus, plan: Plan, options: Options) -> tuple[np.ndarray, dict[str, Any]]:
    """Choose every document's split.

    Args:
        corpus: all documents.
        plan: of the preparation.
        options: of the preparation.

    Returns:
        Codes as `choose_splits` returns them, and the tokens that are wanted per split.

    Raises:
        ValueError: a domain cannot fill its budget.
    """
    if options.shares is not None:
        kept = {domain: plan["kept"].get(domain, 1.0) for domain in corpus.domains}
        wants = make_ranges(options.shares, kept)
        wanted = dict.fromkeys(wants)
    else:
        wants = wanted = wanted_tokens(options, corpus.domains)
    arrays = (corpus.hashes, corpus.lengths, corpus.owners)
    try:
        return choose_splits(*arrays, corpus.domains, wants), wanted
    except ShortfallError as error:
        raise ValueError(_explain_shortfall(str(error), plan, options)) from error


def _explain_shortfall(shortfall: str, plan: Plan, options: Options) -> str:
    if any(part < 1 for part in plan["kept"].values()):
        return (
            f"Too few tokens were kept: {shortfall}. Only {plan['kept']} of the documents were "
            "tokenised, by an estimate from samples; if the domain has more text, raise "
            f"estimate_margin={options.estimate_margin} (--estimate-margin) and start over with "
            "--overwrite. If it has not, add text, lower the budget or change the proportions."
        )
    return (
        f"Too few tokens: {shortfall}. Add text, lower the budget, or give this domain a smaller "
        "proportion."
    )


@dataclass
class Stream:
    """The tokens of one split and domain.

    Args:
        split: name of the split.
        domain: name of the domain.
        documents: their numbers in the corpus: int64 [m].
        tokens: of these documents.
        sequences: that are written.
        beyond: tokens in full sequences that the budget has no room for.
    """

    split: str
    domain: str
    documents: np.ndarray
    tokens: int
    sequences: int
    beyond: int


def make_streams(
    corpus: Corpus, codes: np.ndarray, wanted: dict[str, Any], sequence_length: int
) -> list[Stream]:
    """Gather the documents of every split and domain.

    Args:
        corpus: all documents.
        codes: splits of the documents.
        wanted: tokens per split and domain, None for all.
        sequence_length: tokens in a sequence.
    """
    streams = []
    for code, (split, tokens_wanted) in enumerate(wanted.items()):
        for number, domain in enumerate(corpus.domains):
            documents = np.flatnonzero((codes == code) & (corpus.owners == number))
            tokens = int(corpus.lengths[documents].sum(dtype=np.int64))
            full = sequences = tokens // sequence_length
            if tokens_wanted is not None:
                sequences = min(full, tokens_wanted[domain] // sequence_length)
            beyond = (full - sequences) * sequence_length
            streams.append(Stream(split, domain, documents, tokens, sequences, beyond))
    return streams


def check_streams(streams: list[Stream], sequence_length: int) -> None:
    """Refuse a preparation in which a domain has no sequence in some split.

    Args:
        streams: of all splits and domains.
        sequence_length: tokens in a sequence, for the message.

    Raises:
        ValueError: a split of a domain is empty; the message names every one.
    """
    empty = [
        f"{stream.domain}/{stream.split} ({len(stream.documents)} documents, "
        f"{stream.tokens} tokens)"
        for stream in streams
        if not stream.sequences
    ]
    if not streams or empty:
        raise ValueError(
            f"Too little text for one sequence of {sequence_length} tokens in "
            f"{', '.join(empty) or 'the whole input'}. Add documents to these domains or take "
            "them out, raise the split's budget or share, or lower sequence_length."
        )


def count_left_out(corpus: Corpus, codes: np.ndarray) -> dict[str, dict[str, int]]:
    """Count per domain the tokenised documents that are in no split.

    Args:
        corpus: all documents.
        codes: splits of the documents.
    """
    counts: dict[str, dict[str, int]] = {}
    for number, domain in enumerate(corpus.domains):
        counts[domain] = {}
        for name, code in (("duplicates", DUPLICATE), ("beyond_budget", BEYOND)):
            chosen = (corpus.owners == number) & (codes == code)
            counts[domain][f"documents_{name}"] = int(chosen.sum())
            counts[domain][f"tokens_{name}"] = int(corpus.lengths[chosen].sum(dtype=np.int64))
    return counts


def shard_tasks(
    out: Path, corpus: Corpus, streams: list[Stream], options: Options, vocabulary_size: int
) -> Iterator[dict[str, Any]]:
    """Describe every shard: where its tokens stand.

    Args:
        out: output folder.
        corpus: all documents.
        streams: of all splits and domains.
        options: of the preparation.
        vocabulary_size: number of tokens, which decides their type.
    """
    dtype, length = token_type(vocabulary_size), options.sequence_length
    header = shards.describe_columns(dtype, length, options.shard_bytes, options.compression)
    per_shard = shards.sequences_per_shard(header) * length
    ends = np.cumsum(corpus.lengths, dtype=np.int64)
    for stream in streams:
        lengths = corpus.lengths[stream.documents]
        spans = stream_spans(lengths, per_shard, stream.sequences * length)
        for number, (first, last, skipped, tokens) in enumerate(spans):
            reads = _locate(stream.documents[first:last], corpus, ends, skipped, tokens)
            yield {
                "name": f"{stream.split}/{stream.domain}/{shards.shard_name(number)}",
                "out": str(out),
                "stream": f"{stream.split}/{stream.domain}",
                "number": number,
                "reads": reads,
                "tokens": tokens,
                "header": header,
            }


def _locate(
    documents: np.ndarray, corpus: Corpus, ends: np.ndarray, skipped: int, tokens: int
) -> np.ndarray:
    """Rows of piece, first token in it and number of tokens: int64 [reads, 3]."""
    pieces = np.searchsorted(corpus.first, documents, side="right") - 1
    counts = corpus.lengths[documents].astype(np.int64)
    starts = ends[documents] - counts
    first = corpus.first[pieces]
    before = np.where(first > 0, ends[first - 1], 0)
    starts -= before
    starts[0] += skipped
    counts[0] -= skipped
    counts[-1] -= counts.sum() - tokens
    return _join(np.stack([pieces, starts, counts], axis=1))


def _join(reads: np.ndarray) -> np.ndarray:
    """Make one read of documents that stand one after the other."""
    follows = (reads[1:, 0] == reads[:-1, 0]) & (reads[1:, 1] == reads[:-1, 1] + reads[:-1, 2])
    heads = np.flatnonzero(np.concatenate([[True], ~follows]))
    joined = reads[heads]
    joined[:, 2] = np.add.reduceat(reads[:, 2], heads)
    return joined


def write_shard(task: dict[str, Any], report_progress: Any) -> dict[str, Any]:
    """Write one shard and its record, unless an earlier run has done it.

    Args:
        task: from `shard_tasks`.
        report_progress: called with the tokens written.

    Returns:
        The record: `stream`, `number`, `entry` of index.json, `file`, `bytes` and `sha256`.

    Raises:
        DiskFullError: the disk is full.
    """
    out = Path(task["out"])
    record_path = out / WORK / RECORDS / task["stream"] / f"{task['number']:05d}.json"
    record = read_json(record_path)
    if record is None or not _is_intact(out, record):
        record = _write_shard(out, task)
        write_json(record_path, record)
    report_progress({"tokens": task["tokens"]})
    return record


def _is_intact(out: Path, record: dict[str, Any]) -> bool:
    try:
        content = (out / record["file"]).read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content).hexdigest() == record["sha256"]


def _write_shard(out: Path, task: dict[str, Any]) -> dict[str, Any]:
    header, compression = task["header"], task["header"]["compression"]
    _, dtype, length = header["column_encodings"][0].split(":")
    tokens = read_tokens(out, task["reads"], task["tokens"], dtype).reshape(-1, int(length))
    raw = shards.encode_shard(tokens, header)
    content = shards.compress(raw, compression)
    zip_bytes = None if compression is None else len(content)
    entry = shards.index_entry(task["number"], len(tokens), len(raw), zip_bytes, header)
    name = (entry["zip_data"] or entry["raw_data"])["basename"]
    path = out / task["stream"] / name
    # A run killed between the shard and its record leaves a whole shard, which need not be redone.
    if not path.is_file() or path.read_bytes() != content:
        write_bytes(path, content)
    return {
        "stream": task["stream"],
        "number": task["number"],
        "entry": entry,
        "file": f"{task['stream']}/{name}",
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def read_tokens(out: Path, reads: np.ndarray, count: int, dtype: str) -> np.ndarray:
    """Copy tokens out of the pieces: [count].

    Args:
        out: output folder.
        reads: rows of piece, first token and number of tokens, sorted by piece.
        count: tokens of all rows together.
        dtype: numpy name of the token type.

    Raises:
        OSError: a piece is shorter than its documents say.
    """
    tokens, position, size = np.empty(count, dtype=dtype), 0, np.dtype(dtype).itemsize
    for piece in np.unique(reads[:, 0]):
        path = piece_folder(out, int(piece)) / TOKENS
        with path.open("rb", buffering=0) as file:
            for _, start, length in reads[reads[:, 0] == piece]:
                file.seek(int(start) * size)
                target = memoryview(tokens[position : position + length]).cast("B")
                if file.readinto(target) != len(target):
                    raise OSError(f"{path} is cut short. Remove {path.parent} and run again.")
                position += int(length)
    return tokens
