"""Estimate from samples how much text and how many tokens every domain has."""

import re
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apex_composer.data_prep.errors import SourceError
from apex_composer.data_prep.read.arrow import count_rows
from apex_composer.data_prep.read.documents import Document, read_documents
from apex_composer.data_prep.read.remote import is_remote
from apex_composer.data_prep.read.sources import Source

if TYPE_CHECKING:
    from apex_composer.data_prep.tokens.word_encoder import Encoder

# Files of a domain that are looked into, and bytes of text that are taken from each.
FILES_SAMPLED = 16
TEXT_SAMPLED = 1 << 17
DOMAIN_SAMPLED = 1 << 20
# Decompressed bytes of an archive that show how far it was compressed.
PROBE_BYTES = 8 << 20
HASH_OR_NUMBER = re.compile(r"[0-9a-f]{8}[0-9a-f-]*|\d+", re.IGNORECASE)


@dataclass
class Estimate:
    """What a domain is expected to hold.

    Args:
        documents: number of them. Default: 0.
        text_bytes: their text in UTF-8. Default: 0.
        tokens: those of the text, bos and eos included. Default: 0.
        seconds: to tokenise it on one core. Default: 0.
        sampled: documents that were looked at. Default: 0.
    """

    documents: float = 0.0
    text_bytes: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    sampled: int = 0


@dataclass
class Sample:
    """The beginning of one file.

    Args:
        texts: the texts per domain.
        scale: how many times the sample's text the file has.
    """

    texts: dict[str, list[str]]
    scale: float


def take_samples(sources: Iterable[Source]) -> list[Sample]:
    """Read the beginning of some files of every domain, evenly spaced in their order.

    Raises:
        SourceError: a file cannot be read.
    """
    groups: dict[str, list[Source]] = defaultdict(list)
    for source in sources:
        # Files of Dolma that are named alike (c4-0000, c4-0001) are of one source; names of hashes
        # say nothing, and a sample of every file would not fit into memory.
        alike = re.sub(HASH_OR_NUMBER, "", source.path) if source.format == "dolma" else ""
        groups[source.domain or alike].append(source)
    samples = []
    for group in groups.values():
        count = min(FILES_SAMPLED, len(group))
        chosen = [group[index * len(group) // count] for index in range(count)]
        drawn = [
            _take_sample(source, max(TEXT_SAMPLED, DOMAIN_SAMPLED // count)) for source in chosen
        ]
        # The files that are not looked into are as the others are.
        seen = sum(source.bytes for source in chosen)
        spread = sum(source.bytes for source in group) / seen if seen else len(group) / count
        for sample in drawn:
            sample.scale *= spread
        samples += drawn
    return samples


def _take_sample(source: Source, limit: int) -> Sample:
    texts: dict[str, list[str]] = defaultdict(list)
    size, scale, last = 0, 1.0, Document(0, "", "")
    for document in read_documents(source, 0, None, lambda *reject: None):
        if size >= limit:
            scale = _scale(source, last)
            break
        last = document
        texts[document.domain].append(document.text)
        size += len(document.text.encode("utf-8"))
    return Sample(dict(texts), max(1.0, scale))


def _scale(source: Source, last: Document) -> float:
    """How many times the sample's text a file has.

    Args:
        last: that of the sample; what was rejected before it counts as it does in the whole file.
    """
    if is_remote(source.path):  # neither its size nor its content is at hand: no estimate
        return 1.0
    try:
        if source.path.endswith(".parquet"):
            from pyarrow import parquet

            return parquet.read_metadata(source.path).num_rows / last.line
        if source.path.endswith(".arrow"):
            return count_rows(Path(source.path)) / last.line
        # An archive's size is told by how far its beginning is compressed.
        return source.bytes * (1 if source.splittable else _decompression(source)) / last.stop
    except (EOFError, OSError, ValueError) as error:
        raise SourceError(
            f"{source.path} cannot be read: {error}. The file is damaged or cut short: fetch or "
            "compress it again."
        ) from error


def _decompression(source: Source) -> float:
    """Decompressed bytes for each stored byte at the beginning of an archive."""
    import pyarrow

    with open(source.path, "rb", buffering=0) as raw:
        kind = "gzip" if source.path.endswith(".gz") else "zstd"
        stream = pyarrow.CompressedInputStream(raw, kind)
        size = 0
        # Zeros behind an archive are no damage, and what is will be told when all is read.
        with suppress(OSError):
            while size < PROBE_BYTES and (block := stream.read(1 << 14)):
                size += len(block)
        return size / max(1, raw.tell())


def estimate_domains(samples: list[Sample], tokenizer_file: Path) -> dict[str, Estimate]:
    """Add the samples up, per domain in sorted order.

    Args:
        tokenizer_file: `tokenizer.json` to count tokens and time with.
    """
    from apex_composer.data_prep.tokens.word_encoder import read_encoder

    encode = read_encoder(str(tokenizer_file))
    estimates: dict[str, Estimate] = defaultdict(Estimate)
    for sample in samples:
        for domain, texts in sample.texts.items():
            estimate = estimates[domain]
            estimate.sampled += len(texts)
            estimate.documents += sample.scale * len(texts)
            estimate.text_bytes += sample.scale * sum(len(text.encode()) for text in texts)
            tokens, seconds, part = _measure(encode, texts)
            estimate.tokens += sample.scale * (tokens / part + 2 * len(texts))
            estimate.seconds += sample.scale * seconds / part
    return dict(sorted(estimates.items()))


def _measure(encode: "Encoder", texts: list[str]) -> tuple[int, float, float]:
    """Tokens and seconds of the beginnings of texts, and the part of the texts that they are."""
    limit = max(1, TEXT_SAMPLED // len(texts)) if len(texts) < 4 else TEXT_SAMPLED
    cut = [text[:limit] for text in texts]
    started = time.perf_counter()
    tokens = sum(map(len, encode(cut)))
    seconds = time.perf_counter() - started
    return tokens, seconds, max(1, sum(map(len, cut))) / max(1, sum(map(len, texts)))
