"""What phase 1 knows of every document, and which split and stream each goes to."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apex_composer.data_prep.atomic_files import read_json
from apex_composer.data_prep.choose.budgets import wanted_tokens
from apex_composer.data_prep.choose.job_plan import Plan
from apex_composer.data_prep.choose.proportions import some_of
from apex_composer.data_prep.choose.splits import AT_ONCE, BEYOND, DUPLICATE, choose_splits
from apex_composer.data_prep.errors import ShortfallError
from apex_composer.data_prep.options import Options
from apex_composer.data_prep.paths import DOCUMENTS, REPORT, piece_folder
from apex_composer.data_prep.tokens.document_hash import HASH_WORDS
from apex_composer.data_prep.tokens.piece import PieceReport, check_domains, document_type


@dataclass
class Corpus:
    """All documents of all pieces, in the order of the input.

    Args:
        domains: names, sorted.
        lengths: tokens: uint32 [n].
        owners: indices into `domains`: uint16 [n].
        first: number of each piece's first document, and n: int64 [pieces + 1].
        reports: one of each piece.
    """

    domains: list[str]
    lengths: np.ndarray
    owners: np.ndarray
    first: np.ndarray
    reports: list[PieceReport]


@dataclass
class Stream:
    """The tokens of one split and domain.

    Args:
        split: name of the split.
        domain: name of the domain.
        documents: their numbers in the corpus, rising: uint32 [m], int64 above 2^32.
        tokens: number of them in these documents.
        sequences: number of those that are written.
        beyond: tokens in full sequences that the budget has no room for.
    """

    split: str
    domain: str
    documents: np.ndarray
    tokens: int
    sequences: int
    beyond: int


def read_corpus(out: Path, plan: Plan) -> Corpus:
    """Read what phase 1 knows of every document.

    Args:
        plan: all of whose pieces exist.

    Raises:
        ValueError: a piece is damaged, or there are too many domains.
    """
    reports = [read_report(piece_folder(out, number)) for number in range(len(plan.pieces))]
    domains = sorted({domain for report in reports for domain in report.domain_names})
    check_domains(len(domains), "The input")
    numbers = {domain: number for number, domain in enumerate(domains)}
    first = np.cumsum([0, *(report.tokenised for report in reports)])
    lengths, owners = np.empty(first[-1], np.uint32), np.empty(first[-1], np.uint16)
    for part, report, documents in _read_pieces(out, plan, reports):
        names = np.array([numbers[n] for n in report.domain_names], dtype=np.uint16)
        lengths[part], owners[part] = documents["length"], names[documents["domain"]]
    return Corpus(domains, lengths, owners, first, reports)


def read_hashes(out: Path, plan: Plan, corpus: Corpus) -> np.ndarray:
    """Read the hashes of a corpus, its largest part by far, which `select` alone needs.

    Returns:
        The most significant word of each first: uint64 [n, words].
    """
    hashes = np.empty((corpus.first[-1], HASH_WORDS[plan.document_hash]), np.uint64)
    for part, _, documents in _read_pieces(out, plan, corpus.reports):
        hashes[part] = documents["hash"]
    return hashes


def _read_pieces(
    out: Path, plan: Plan, reports: list[PieceReport]
) -> Iterator[tuple[slice, PieceReport, np.ndarray]]:
    """Each piece's place among the documents, its report, and its rows of `document_type`."""
    start, row = 0, document_type(plan.document_hash)
    for number, report in enumerate(reports):
        folder = piece_folder(out, number)
        documents = np.fromfile(folder / DOCUMENTS, dtype=row)
        size, expected = (folder / DOCUMENTS).stat().st_size, report.tokenised * row.itemsize
        if size != expected:  # also a piece of rows of another hash
            raise _damaged(folder, f"{DOCUMENTS} has {size} bytes instead of {expected}")
        yield slice(start, start + len(documents)), report, documents
        start += len(documents)


def read_report(folder: Path) -> PieceReport:
    """The report of a finished piece.

    Raises:
        ValueError: the folder has none; the message says which piece to remove.
    """
    report = read_json(folder / REPORT)
    if report is None:
        raise _damaged(folder, f"{REPORT} is missing")
    return PieceReport(**report)


def _damaged(folder: Path, what: str) -> ValueError:
    return ValueError(
        f"The piece {folder} is damaged: {what}. Remove this folder and give the same command "
        "again: the piece is made anew."
    )


def select(
    out: Path, corpus: Corpus, plan: Plan, options: Options
) -> tuple[np.ndarray, dict[str, Any]]:
    """Choose every document's split.

    Returns:
        Codes as `choose_splits` returns them, and the tokens that are wanted per split.

    Raises:
        ValueError: a domain cannot fill its budget.
    """
    wanted = wanted_tokens(options, corpus.domains)
    arrays = (read_hashes(out, plan, corpus), corpus.lengths, corpus.owners)
    try:
        return choose_splits(*arrays, corpus.domains, wanted), wanted
    except ShortfallError as error:
        raise ValueError(_explain_shortfall(error, plan, options)) from error


def _explain_shortfall(shortfall: ShortfallError, plan: Plan, options: Options) -> str:
    parts = {domain: plan.kept.get(domain, 1.0) for domain in shortfall.domains}
    if min(parts.values()) < 1:
        return (
            f"Too few tokens were kept: {shortfall}. By an estimate from samples only these parts "
            f"of the documents were tokenised: {parts}. Raise estimate_margin="
            f"{options.estimate_margin} (--estimate-margin) and start over with --overwrite; for "
            "a domain of part 1.0 there is no more text: add some, or lower its budget."
        )
    return (
        f"Too few tokens: {shortfall}. Add text, lower the budget, or give this domain a smaller "
        "proportion."
    )


def make_streams(
    corpus: Corpus, codes: np.ndarray, wanted: dict[str, Any], sequence_length: int
) -> list[Stream]:
    """Gather the documents of every split and domain.

    Args:
        codes: splits of the documents.
        wanted: tokens per split and domain, None for all.
    """
    streams = []
    for code, (split, tokens_wanted) in enumerate(wanted.items()):
        for number, domain in enumerate(corpus.domains):
            documents = _find(codes, code, corpus.owners, number)
            tokens = int(corpus.lengths[documents].sum(dtype=np.int64))
            full = sequences = tokens // sequence_length
            if tokens_wanted is not None:
                sequences = min(full, tokens_wanted[domain] // sequence_length)
            beyond = (full - sequences) * sequence_length
            streams.append(Stream(split, domain, documents, tokens, sequences, beyond))
    return streams


def _find(codes: np.ndarray, code: int, owners: np.ndarray, owner: int) -> np.ndarray:
    """The documents of one split and domain; a part at a time, as np.flatnonzero takes 8 bytes."""
    index = np.uint32 if len(codes) < 1 << 32 else np.int64
    found = [np.empty(0, index)]
    for start in range(0, len(codes), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        own = np.flatnonzero((codes[part] == code) & (owners[part] == owner))
        found.append((own + start).astype(index))
    return np.concatenate(found)


def check_streams(streams: list[Stream], options: Options) -> None:
    """Refuse a preparation in which a domain has no sequence in some split.

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
            f"Too little text for one sequence of {options.sequence_length} tokens in "
            f"{some_of(empty) or 'the whole input'}. Add documents to these domains or take "
            "them out, raise the split's budget, or lower sequence_length."
        )


def count_left_out(corpus: Corpus, codes: np.ndarray, domain: int) -> dict[str, int]:
    """Count a domain's tokenised documents that are in no split.

    Args:
        codes: splits of the documents.
        domain: index into the corpus' domains.
    """
    counts = {}
    for name, code in (("duplicates", DUPLICATE), ("beyond_budget", BEYOND)):
        chosen = (corpus.owners == domain) & (codes == code)
        counts[f"documents_{name}"] = int(chosen.sum())
        counts[f"tokens_{name}"] = int(corpus.lengths[chosen].sum(dtype=np.int64))
    return counts
