"""Estimate from samples how much text and how many tokens every domain has."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apex_composer.data_prep.readers import Source, read_documents

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Files of a domain that are looked into, and bytes of text that are taken from each.
FILES_SAMPLED = 16
TEXT_SAMPLED = 1 << 17
# A stored byte of a file that is no text of a sample: gzip and zstd reach about this.
TYPICAL_RATIO = 3.0


@dataclass
class Estimate:
    """What a domain is expected to hold.

    Args:
        documents: number of them. Default: 0.
        text_bytes: their text in UTF-8. Default: 0.
        tokens: of the text, bos and eos included. Default: 0.
        seconds: to tokenise it on one core. Default: 0.
    """

    documents: float = 0.0
    text_bytes: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0


@dataclass
class Sample:
    """The beginning of one file.

    Args:
        source: the file.
        texts: the texts per domain.
        scale: how many times the sample's text the file has.
    """

    source: Source
    texts: dict[str, list[str]]
    scale: float


def take_samples(sources: Iterable[Source]) -> list[Sample]:
    """Read the beginning of some files of every domain, evenly spaced in their order.

    Args:
        sources: all input files.

    Raises:
        SourceError: a file cannot be read.
    """
    groups: dict[str | None, list[Source]] = defaultdict(list)
    for source in sources:
        groups[source.domain].append(source)
    samples = []
    for group in groups.values():
        count = min(FILES_SAMPLED, len(group))
        chosen = [group[index * len(group) // count] for index in range(count)]
        drawn = [_take_sample(source) for source in chosen]
        # The files that are not looked into are as the others are.
        seen = sum(source.bytes for source in chosen)
        spread = sum(source.bytes for source in group) / seen if seen else len(group) / count
        for sample in drawn:
            sample.scale *= spread
        samples += drawn
    return samples


def _take_sample(source: Source) -> Sample:
    texts: dict[str, list[str]] = defaultdict(list)
    size, whole, reached = 0, True, 0
    for document in read_documents(source, 0, None, lambda *reject: None):
        if size >= TEXT_SAMPLED:
            whole, reached = False, document.place
            break
        texts[document.domain].append(document.text)
        size += len(document.text.encode("utf-8"))
    if whole:
        scale = 1.0
    elif source.splittable:  # its places are bytes
        scale = source.bytes / reached
    else:
        scale = max(1.0, source.bytes * _text_per_byte(source, texts) / size)
    return Sample(source, dict(texts), scale)


def _text_per_byte(source: Source, texts: dict[str, list[str]]) -> float:
    """Text in a stored byte of an archive, seen by compressing the sample again."""
    import pyarrow

    content = "\n".join(text for domain in texts.values() for text in domain).encode("utf-8")
    if not source.path.endswith((".gz", ".zst", ".parquet")):
        return 1.0
    packed = pyarrow.Codec("zstd", compression_level=3).compress(content)
    return max(1.0, len(content) / packed.size)


def estimate_domains(samples: list[Sample], tokenizer_file: Path | None) -> dict[str, Estimate]:
    """Add the samples up, per domain in sorted order.

    Args:
        samples: from `take_samples`.
        tokenizer_file: `tokenizer.json` to count tokens and time with, or None to count no tokens.
    """
    from apex_composer.data_prep.tokenizer import read_backend

    backend = read_backend(str(tokenizer_file)) if tokenizer_file else None
    estimates: dict[str, Estimate] = defaultdict(Estimate)
    for sample in samples:
        for domain, texts in sample.texts.items():
            estimate = estimates[domain]
            size = sum(len(text.encode("utf-8")) for text in texts)
            estimate.documents += sample.scale * len(texts)
            estimate.text_bytes += sample.scale * size
            if backend is not None:
                tokens, seconds, part = _measure(backend, texts)
                estimate.tokens += sample.scale * (tokens / part + 2 * len(texts))
                estimate.seconds += sample.scale * seconds / part
    return dict(sorted(estimates.items()))


def _measure(backend: "Tokenizer", texts: list[str]) -> tuple[int, float, float]:
    """Tokens and seconds of the beginnings of texts, and the part of the texts that they are."""
    import time

    limit = max(1, TEXT_SAMPLED // len(texts)) if len(texts) < 4 else TEXT_SAMPLED
    cut = [text[:limit] for text in texts]
    started = time.perf_counter()
    tokens = sum(len(backend.encode(text, add_special_tokens=False).ids) for text in cut)
    seconds = time.perf_counter() - started
    return tokens, seconds, max(1, sum(map(len, cut))) / max(1, sum(map(len, texts)))
