"""Phase 1: a worker turns one piece of the input into tokens, hashes and rejects on disk."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from apex_composer.data_prep.atomic_files import new_folder
from apex_composer.data_prep.errors import UnfitError
from apex_composer.data_prep.paths import (
    DOCUMENTS,
    DOWNLOADS,
    REJECTS,
    REPORT,
    TOKENIZER_FILE,
    TOKENS,
    piece_folder,
)
from apex_composer.data_prep.read.documents import read_documents
from apex_composer.data_prep.read.sources import Source
from apex_composer.data_prep.tokens.document_hash import HASH_WORDS, hash_limit, read_hash
from apex_composer.data_prep.tokens.long_texts import batch_parts, starts_with_blank
from apex_composer.data_prep.tokens.tokenizer import TokenizerFacts, token_type
from apex_composer.data_prep.tokens.word_encoder import read_encoder

UNKNOWN = "unknown"  # domain of a record that shows none, such as broken JSON
PROGRESS = ("documents", "tokens", "characters")
MOST_DOMAINS = 1 << 16  # two bytes number them

Progress = Callable[[dict[str, Any]], None]


def document_type(document_hash: str) -> np.dtype:
    """The row that a piece has of every document; `hash` begins with what orders the documents."""
    words = HASH_WORDS[document_hash]
    return np.dtype([("hash", "<u8", (words,)), ("length", "<u4"), ("domain", "<u2")])


def check_domains(count: int, place: str) -> None:
    """Refuse more domains than can be numbered.

    Raises:
        UnfitError: there are more than MOST_DOMAINS.
    """
    if count > MOST_DOMAINS:
        raise UnfitError(
            f"{place} has more than {MOST_DOMAINS:,} domains: its records name nearly every one "
            "its own source. Give --format jsonl, of which a folder is a domain (rename .json.gz "
            "to .jsonl.gz), or write fewer sources."
        )


@dataclass(frozen=True)
class PieceTask:
    """What a worker needs to know of a piece.

    Args:
        out: output folder.
        number: place among the pieces, from 0.
        source: file to read.
        start: first byte.
        stop: byte after the last, None for the file's end.
        kept: part of every domain's documents that is tokenised.
        tokenizer: the one that is used.
        document_hash: name of the hash of the documents.
    """

    out: Path
    number: int
    source: Source
    start: int
    stop: int | None
    kept: dict[str, float]
    tokenizer: TokenizerFacts
    document_hash: str

    @property
    def name(self) -> str:
        """For messages."""
        whole = self.start == 0 and self.stop is None
        return self.source.path + ("" if whole else f" bytes {self.start}-{self.stop or 'end'}")


@dataclass
class PieceReport:
    """What has been read of a piece; `report.json` of a finished one holds it.

    Args:
        source: path of the file.
        documents: how many were read. Default: 0.
        tokens: those of the tokenised ones. Default: 0.
        characters: those of all that were read. Default: 0.
        lines: number of them, blank ones and rejects too. Default: 0.
        domain_names: names in the order of their numbers. Default: none.
        domains: per domain, how many documents were read and how many tokenised. Default: none.
        rejects: per domain, the number of bad records by reason. Default: none.
        content: hash of the hashes of all texts read. Default: "".
    """

    source: str
    documents: int = 0
    tokens: int = 0
    characters: int = 0
    lines: int = 0
    domain_names: list[str] = field(default_factory=list)
    domains: dict[str, dict[str, int]] = field(default_factory=dict)
    rejects: dict[str, dict[str, int]] = field(default_factory=dict)
    content: str = ""

    @property
    def rejected(self) -> int:
        """Bad records of all domains."""
        return sum(sum(reasons.values()) for reasons in self.rejects.values())

    @property
    def tokenised(self) -> int:
        """Documents of all domains whose tokens are kept."""
        return sum(counts["documents_tokenised"] for counts in self.domains.values())


def tokenise_piece(task: PieceTask, report_progress: Progress) -> PieceReport:
    """Write the folder of one piece, whole or not at all.

    Args:
        report_progress: called after every batch with the documents, tokens and characters since
            the last one.

    Raises:
        SourceError: the input cannot be read.
        UnfitError: it has too many domains.
        DiskFullError: the disk is full.
    """
    with new_folder(piece_folder(task.out, task.number)) as partial, ExitStack() as stack:
        tokens, documents, rejects = (
            stack.enter_context((partial / name).open("wb"))
            for name in (TOKENS, DOCUMENTS, REJECTS)
        )
        report = PieceReport(task.source.path)
        Piece(task, report, tokens, documents, rejects, report_progress).read()
        (partial / REPORT).write_text(json.dumps(asdict(report), sort_keys=True) + "\n")
    return report


@dataclass
class Piece:
    """The state of reading one piece.

    Args:
        task: what is to be read, and how.
        report: of what has been read so far.
        tokens: file that takes the tokens of the documents, one after the other.
        documents: file that takes one row of `document_type` for each document.
        rejects: file that takes one line of JSON for each bad record.
        report_progress: called after every batch.
        length: tokens so far of the document that is being written.
        content: hash of the hashes of all texts so far.
        told: what of the report `report_progress` has been told.
    """

    task: PieceTask
    report: PieceReport
    tokens: IO[bytes]
    documents: IO[bytes]
    rejects: IO[bytes]
    report_progress: Progress
    length: int = 0
    content: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    told: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PROGRESS, 0))

    def read(self) -> None:
        """Tokenise the piece's documents."""
        encode = read_encoder(str(self.task.out / TOKENIZER_FILE))
        for batch in batch_parts(self._kept(), starts_with_blank(encode)):
            self._write(encode([part for _, part, _ in batch]), batch)
            self._tell()
        self._tell()
        self.report.domain_names = list(self.report.domains)
        self.report.content = self.content.hexdigest()

    def _tell(self) -> None:
        counts = {key: getattr(self.report, key) for key in PROGRESS}
        news = {key: count - self.told[key] for key, count in counts.items()}
        self.told = counts
        self.report_progress(news | {"source": self.report.source})

    def _kept(self) -> Iterator[tuple[tuple[bytes, int], str]]:
        """The documents whose hash is below their domain's limit: hash, domain and text."""
        task, report = self.task, self.report
        documents = read_documents(
            task.source,
            task.start,
            task.stop,
            self._reject,
            on_end=self._count_lines,
            cache=task.out / DOWNLOADS,
        )
        digest_of, add_content = read_hash(task.document_hash), self.content.update
        domains: dict[str, tuple[int, bytes, dict[str, int]]] = {}
        for _, domain, text, _ in documents:
            if domain not in domains:
                check_domains(len(domains) + 1, task.source.path)
                counts = report.domains[domain] = {"documents": 0, "documents_tokenised": 0}
                domains[domain] = len(domains), hash_limit(task.kept, domain), counts
            number, limit, counts = domains[domain]
            digest = digest_of(text)
            add_content(digest)
            report.documents += 1
            report.characters += len(text)
            counts["documents"] += 1
            if digest < limit:
                counts["documents_tokenised"] += 1
                yield (digest, number), text

    def _write(self, encoded: list[np.ndarray], batch: list[tuple[Any, str, str]]) -> None:
        """Append tokens, with bos before a document's first part and eos after its last."""
        tokenizer = self.task.tokenizer
        dtype = token_type(tokenizer.vocabulary_size)
        bos = [] if tokenizer.bos is None else [tokenizer.bos]
        digests, lengths, domains = [], [], []
        for ids, ((digest, domain), _, position) in zip(encoded, batch, strict=True):
            before = bos if position in ("first", "only") else []
            after = [tokenizer.eos] if position in ("last", "only") else []
            tokens = np.concatenate([before, ids, after], dtype=dtype, casting="unsafe")
            self.tokens.write(tokens.tobytes())
            self.report.tokens += len(tokens)
            self.length += len(tokens)
            if position in ("last", "only"):
                digests.append(digest)
                lengths.append(self.length)
                domains.append(domain)
                self.length = 0
        rows = np.empty(len(digests), dtype=document_type(self.task.document_hash))
        rows["hash"] = np.frombuffer(b"".join(digests), dtype=">u8").reshape(rows["hash"].shape)
        rows["length"], rows["domain"] = lengths, domains
        self.documents.write(rows.tobytes())

    def _count_lines(self, lines: int) -> None:
        self.report.lines = lines

    def _reject(self, line: int, reason: str, excerpt: str, domain: str | None) -> None:
        domain = domain or UNKNOWN
        # The line is counted from the piece's first; `finish` adds those of the pieces before.
        entry = {"file": self.report.source, "line": line, "reason": reason, "excerpt": excerpt}
        self.rejects.write((json.dumps(entry | {"domain": domain}) + "\n").encode())
        reasons = self.report.rejects.setdefault(domain, {})
        reasons[reason] = reasons.get(reason, 0) + 1
