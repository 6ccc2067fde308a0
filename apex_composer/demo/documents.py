"""Which documents the demo takes, and which of them are held out.

Every domain is divided by itself, in the order of its texts' hashes: first what is held out, then
what trains the base model, then what the continued runs go on with. Where that leaves too little
for the continued runs, they read again what the base model has read. A domain of which no whole
document can be held out (one sequence at least, half of the text at most) is for training only.
Where that is true of every domain, each document is cut into sections, which then count as
documents: held-out text of the same documents, for want of any other.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from apex_composer.data_prep.choose.estimate import take_samples
from apex_composer.data_prep.progress import progress_bar
from apex_composer.data_prep.read.documents import read_documents
from apex_composer.data_prep.read.sources import Source
from apex_composer.data_prep.tokens.document_hash import hash_text

VALIDATION, PRETRAIN, TRAIN = "validation", "pretrain", "train"
SPLITS = (VALIDATION, PRETRAIN, TRAIN)
# Parts of a domain's text; the rest is for the base model.
VALIDATION_SHARE, TRAIN_SHARE = 0.05, 0.3
# Every domain gives so many documents, however long they are, for one of them to be held out.
LEAST_DOCUMENTS = 10
SECTIONS = 20
# A guess before there is a tokenizer; with the demo's vocabulary prose has 3. Should a text have
# more, its domain has a sequence less than was planned, which is said where results are shown.
BYTES_PER_TOKEN = 4
# Sequences that a domain needs in each of its splits for training: two batches.
TRAINING_SEQUENCES = 16
# Share of unusable lines that is allowed, as in `apex-composer prep`.
MOST_REJECTS = 0.001
REJECTS_SHOWN = 20

Texts = dict[str, list[str]]


def take_documents(sources: Sequence[Source], limit: int) -> Texts:
    """Read texts of every domain until it has its part of a limit, all parts being equal.

    Args:
        limit: bytes of text of all domains together.

    Returns:
        Texts per domain, sorted by its name, in the order of the files.

    Raises:
        SourceError: a file cannot be read.
        ValueError: too many lines are unusable; the message names the first.
    """
    domains = {domain for sample in take_samples(sources) for domain in sample.texts}
    domains |= {source.domain for source in sources if source.domain is not None}
    texts: Texts = {domain: [] for domain in domains}
    part = limit / max(1, len(domains))
    room = defaultdict(lambda: part)  # also for a domain that no sample showed
    rejects: list[str] = []

    def is_full(domain: str) -> bool:
        return room[domain] <= 0 and len(texts.get(domain, ())) >= LEAST_DOCUMENTS

    with progress_bar(unit="B", unit_scale=True, desc="reading") as bar:
        for source in sources:
            documents = _read(source, rejects)
            own = list(texts) if source.domain is None else [source.domain]
            while not all(map(is_full, own)) and (document := next(documents, None)):
                domain, text = document
                if not is_full(domain):
                    texts.setdefault(domain, []).append(text)
                    room[domain] -= _size([text])
                    bar.update(_size([text]))
    _check_rejects(rejects, sum(map(len, texts.values())))
    return dict(sorted(texts.items()))


def _read(source: Source, rejects: list[str]) -> Iterator[tuple[str, str]]:
    def reject(line: int, reason: str, *_: object) -> None:
        rejects.append(f"{source.path}:{line}: {reason}")

    for document in read_documents(source, 0, None, reject):
        yield document.domain, document.text


def _check_rejects(rejects: list[str], documents: int) -> None:
    lines = len(rejects) + documents
    message = f"{len(rejects)} of {lines} lines are not usable. The first of them:"
    message = "\n  ".join([message, *rejects[:REJECTS_SHOWN]])
    if len(rejects) > MOST_REJECTS * lines:
        raise ValueError(f"{message}\nRepair or remove these lines.")
    if rejects:
        print(message, file=sys.stderr)


def divide(
    texts: Mapping[str, Sequence[str]], sequence_length: int
) -> tuple[dict[str, Texts], bool]:
    """Divide the texts of all domains among the splits, so that no text is there twice.

    Args:
        texts: those of every domain.

    Returns:
        Texts per split and domain, and whether they are sections of the documents.
    """
    for sections in (1, SECTIONS):
        seen: set[str] = set()
        divided: dict[str, Texts] = {split: {} for split in SPLITS}
        for domain, documents in texts.items():
            parts = dict.fromkeys(part for text in documents for part in cut(text, sections))
            new = [part for part in parts if part not in seen]
            seen.update(new)
            for split, chosen in divide_domain(new, sequence_length).items():
                divided[split][domain] = chosen
        if any(divided[VALIDATION].values()):
            break
    return divided, sections > 1


def divide_domain(texts: Iterable[str], sequence_length: int) -> Texts:
    """Divide the texts of one domain among the splits.

    Args:
        texts: whole documents, or sections of some, each once.
    """
    order = sorted(texts, key=hash_text)
    size, sequence = _size(order), BYTES_PER_TOKEN * sequence_length
    least = max(sequence, VALIDATION_SHARE * size)
    # From the other end where the first text is too long to be held out.
    candidates = (_gather(ordered, least, size / 2) for ordered in (order, order[::-1]))
    held_out = next((texts for texts in candidates if _size(texts) >= sequence), [])
    rest = sorted(set(order).difference(held_out), key=hash_text)
    train = _gather(rest[::-1], TRAIN_SHARE * size)
    pretrain = rest[: len(rest) - len(train)]
    if min(_size(pretrain), _size(train)) < TRAINING_SEQUENCES * sequence:
        pretrain, train = rest, []
    return {VALIDATION: held_out, PRETRAIN: pretrain, TRAIN: train}


def _gather(texts: Iterable[str], wanted: float, most: float = math.inf) -> list[str]:
    """The first texts until they have the bytes that are wanted, or one more would be too much."""
    gathered: list[str] = []
    size = 0
    for text in texts:
        if size >= wanted or size + _size([text]) > most:
            break
        gathered.append(text)
        size += _size([text])
    return gathered


def _size(texts: Iterable[str]) -> int:
    """Bytes of texts in UTF-8."""
    return sum(len(text.encode("utf-8")) for text in texts)


def cut(text: str, sections: int) -> Iterator[str]:
    """Cut a text at the ends of lines, else between words, else anywhere.

    Args:
        sections: how many; blank ones are left out. 1 leaves the text as it is.
    """
    start = 0
    for number in range(1, sections):
        target = number * len(text) // sections
        end = text.rfind("\n", start, target) + 1 or text.rfind(" ", start + 1, target)
        stop = end if end > 0 else max(start, target)
        if text[start:stop].strip():
            yield text[start:stop]
        start = stop
    if sections == 1 or text[start:].strip():
        yield text[start:]
