"""Phase 1: a worker turns one piece of the input into tokens, hashes and rejects on disk."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from apex_composer.data_prep.atomic_files import new_folder
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
from apex_composer.data_prep.tokens.document_hash import hash_limit, hash_text
from apex_composer.data_prep.tokens.long_texts import batch_parts, starts_with_blank
from apex_composer.data_prep.tokens.tokenizer import TokenizerFacts, token_type
from apex_composer.data_prep.tokens.word_encoder import read_encoder

UNKNOWN = "unknown"  # domain of a record that shows none, such as broken JSON
# Written as they come: an archive may hold millions of documents.
DOCUMENT_TYPE = np.dtype([("hash", "<u8"), ("length", "<u4"), ("domain", "<u2")])

PROGRESS = ("documents", "tokens", "characters")

Progress = Callable[[dict[str, Any]], None]


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
    """

    out: Path
    number: int
    source: Source
    start: int
    stop: int | None
    kept: dict[str, float]
    tokenizer: TokenizerFacts

    @property
    def name(self) -> str:
        """For messages."""
        whole = self.start == 0 and self.stop is None
        return self.source.path + ("" if whole else f" bytes {self.start}-{self.stop or 'end'}")


@dataclass(frozen=True)
class PieceReport:
    """What `report.json` of a finished piece holds.

    Args:
        source: path of the file.
        documents: how many were read.
        tokens: those of the tokenised ones.
        characters: those of all that were read.
        lines: number of them, blank ones and rejects too.
        domain_names: names in the order of their numbers.
        domains: per domain, how many documents were read and how many tokenised.
        rejects: per domain, the number of bad records by reason.
        content: hash of all texts read.
    """

    source: str
    documents: int
    tokens: int
    characters: int
    lines: int
    domain_names: list[str]
    domains: dict[str, dict[str, int]]
    rejects: dict[str, dict[str, int]]
    content: str

    @property
    def rejected(self) -> int:
        """Bad records of all domains."""
        return sum(sum(reasons.values()) for reasons in self.rejects.values())


def tokenise_piece(task: PieceTask, report_progress: Progress) -> PieceReport:
    """Write the folder of one piece, whole or not at all.

    Args:
        report_progress: called after every batch with the documents, tokens and characters since
            the last one.

    Raises:
        SourceError: the input cannot be read.
        DiskFullError: the disk is full.
    """
    with new_folder(piece_folder(task.out, task.number)) as partial, ExitStack() as stack:
        tokens, documents, rejects = (
            stack.enter_context((partial / name).open("wb"))
            for name in (TOKENS, DOCUMENTS, REJECTS)
        )
        piece = Piece(task, tokens, documents, rejects, report_progress)
        piece.read()
        report = piece.report()
        (partial / REPORT).write_text(json.dumps(asdict(report), sort_keys=True) + "\n")
    return report


@dataclass
class Piece:
    """The state of reading one piece.

    Args:
        task: what is to be read, and how.
        tokens: file that takes the tokens of the documents, one after the other.
        documents: file that takes one row of DOCUMENT_TYPE for each document.
        rejects: file that takes one line of JSON for each bad record.
        report_progress: called after every batch.
        length: tokens so far of the document that is being written.
        lines: number of them in the piece, known at its end.
        domains: counts of each domain, in the order of their numbers.
        content: hash of all texts so far.
        counts: what has been read so far.
        reported: what of it has been reported.
        rejected: bad records by domain and reason.
    """

    task: PieceTask
    tokens: IO[bytes]
    documents: IO[bytes]
    rejects: IO[bytes]
    report_progress: Progress
    length: int = 0
    lines: int = 0
    domains: dict[str, dict[str, int]] = field(default_factory=dict)
    content: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PROGRESS, 0))
    reported: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PROGRESS, 0))
    rejected: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def read(self) -> None:
        """Tokenise the piece's documents."""
        encode = read_encoder(str(self.task.out / TOKENIZER_FILE))
        for batch in batch_parts(self._kept(), starts_with_blank(encode)):
            self._write(encode([part for _, part, _ in batch]), batch)
            self._report_progress()
        self._report_progress()

    def _report_progress(self) -> None:
        news = {key: self.counts[key] - self.reported[key] for key in PROGRESS}
        self.reported = dict(self.counts)
        self.report_progress(news | {"source": self.task.source.path})

    def _kept(self) -> Iterator[tuple[tuple[int, int], str]]:
        """The documents whose hash is below their domain's limit."""
        task = self.task
        documents = read_documents(
            task.source,
            task.start,
            task.stop,
            self._reject,
            on_end=self._count_lines,
            cache=task.out / DOWNLOADS,
        )
        for document in documents:
            digest, domain = hash_text(document.text), document.domain
            self.content.update(digest.to_bytes(8, "big"))
            self.counts["documents"] += 1
            self.counts["characters"] += len(document.text)
            counts = self.domains.setdefault(domain, {"documents": 0, "documents_tokenised": 0})
            counts["documents"] += 1
            if digest < hash_limit(task.kept, domain):
                counts["documents_tokenised"] += 1
                yield (digest, list(self.domains).index(domain)), document.text

    def _write(self, encoded: list[np.ndarray], batch: list[tuple[Any, str, str]]) -> None:
        """Append tokens, with bos before a document's first part and eos after its last."""
        tokenizer = self.task.tokenizer
        dtype = token_type(tokenizer.vocabulary_size)
        bos = [] if tokenizer.bos is None else [tokenizer.bos]
        for ids, (document, _, position) in zip(encoded, batch, strict=True):
            before = bos if position in ("first", "only") else []
            after = [tokenizer.eos] if position in ("last", "only") else []
            tokens = np.concatenate([before, ids, after], dtype=dtype, casting="unsafe")
            self.tokens.write(tokens.tobytes())
            self.counts["tokens"] += len(tokens)
            self.length += len(tokens)
            if position in ("last", "only"):
                digest, domain = document
                row = np.array((digest, self.length, domain), dtype=DOCUMENT_TYPE)
                self.documents.write(row.tobytes())
                self.length = 0

    def _count_lines(self, lines: int) -> None:
        self.lines = lines

    def _reject(self, line: int, reason: str, excerpt: str, domain: str | None) -> None:
        domain = domain or UNKNOWN
        # The line is counted from the piece's first; `finish` adds those of the pieces before.
        entry = {"file": self.task.source.path, "line": line, "reason": reason, "excerpt": excerpt}
        self.rejects.write((json.dumps(entry | {"domain": domain}) + "\n").encode())
        self.rejected[domain][reason] += 1

    def report(self) -> PieceReport:
        """What has been read."""
        return PieceReport(
            source=self.task.source.path,
            lines=self.lines,
            domain_names=list(self.domains),
            domains=self.domains,
            rejects={domain: dict(reasons) for domain, reasons in sorted(self.rejected.items())},
            content=self.content.hexdigest(),
            **self.counts,
        )
