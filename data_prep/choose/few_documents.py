"""Domains of few documents: what is held out where a share of the hashes may hold nothing.

Shares divide the interval of the hashes (`selection.make_ranges`), which gives every split some
documents only where there are many. Of a domain with few, some whole documents are held out (about
the share of validation, at least one sequence, at most half of the text) and all others are for
training, of the base model and of the continued runs alike. A domain of one document is for
training only. Where that is true of every domain, each document is cut into sections, which then
count as documents: held-out text of the same documents, for want of any other.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from apex_composer.data_prep.choose.budgets import parts_for_limit
from apex_composer.data_prep.choose.estimate import estimate_domains, take_samples
from apex_composer.data_prep.choose.splits import HASHES, hash_text, make_ranges
from apex_composer.data_prep.options import Options
from apex_composer.data_prep.read.documents import Document, read_documents
from apex_composer.data_prep.read.sources import Source

SECTIONS = 20
# A guess before there is a tokenizer; with the demo's vocabulary prose has 3. Should a text have
# more, its domain has a sequence less than was planned, which is said where results are shown.
BYTES_PER_TOKEN = 4
# Sequences that every split for training needs of a domain: two batches of the demo.
TRAINING_SEQUENCES = 16

Bounds = dict[str, list[int]]


def lay_out(sources: list[Source], options: Options) -> dict[str, Any]:
    """Find out, before a tokenizer exists, which documents go where.

    Args:
        sources: input files, sorted.
        options: of the preparation, with shares.

    Returns:
        `kept`: part of every domain's documents that is used; `few`: first hash and the one after
        the last of every split, for domains of few documents; `sections`: how many each document
        is cut into, 1 for none.
    """
    estimates = estimate_domains(take_samples(sources), None)
    kept = parts_for_limit(estimates, options.text_limit)
    for sections in (1, SECTIONS):
        few = _find_few(sources, options, kept, sections)
        held_out = [start < stop for start, stop in (b[options.splits[0]] for b in few.values())]
        if len(few) < len(kept) or any(held_out):
            break
    return {"kept": kept | dict.fromkeys(few, 1.0), "few": few, "sections": sections}


def read_sections(documents: Iterable[Document], sections: int) -> Iterator[Document]:
    """Cut every document at the ends of lines, else between words, else anywhere.

    Args:
        documents: whole ones.
        sections: of each; blank ones are left out. 1 leaves the documents as they are.
    """
    for document in documents:
        text, start = document.text, 0
        for number in range(1, sections):
            target = number * len(text) // sections
            cut = text.rfind("\n", start, target) + 1 or text.rfind(" ", start + 1, target)
            stop = cut if cut > 0 else max(start, target)
            if text[start:stop].strip():
                yield document._replace(text=text[start:stop])
            start = stop
        if sections == 1 or text[start:].strip():
            yield document._replace(text=text[start:])


def _find_few(
    sources: list[Source], options: Options, kept: dict[str, float], sections: int
) -> dict[str, Bounds]:
    """Bounds of the domains in which some split would have too little; reads no more than shows it.

    A domain of many documents is left after some dozens of them.
    """
    ranges = make_ranges(options.shares, kept)
    sequence = BYTES_PER_TOKEN * options.sequence_length
    held_out = options.splits[0]
    needs = {name: sequence * (1 if name == held_out else TRAINING_SEQUENCES) for name in ranges}
    missing = {domain: dict(needs) for domain in kept}
    sizes: dict[str, dict[int, int]] = {domain: {} for domain in kept}
    for source in sources:
        if not missing:
            break
        if source.domain is not None and source.domain not in missing:
            continue
        whole = read_documents(source, 0, None, lambda *reject: None)
        for document in read_sections(whole, sections):
            domain, digest = document.domain, hash_text(document.text)
            if domain not in missing or digest in sizes[domain]:
                continue
            sizes[domain][digest] = size = len(document.text.encode("utf-8"))
            for name, want in ranges.items():
                missing[domain][name] -= size * want.holds(domain, digest)
            if max(missing[domain].values()) <= 0:
                del missing[domain]
                if not missing or source.domain is not None:
                    break
    share = options.shares[held_out]
    return {domain: _bounds(sizes[domain], options, share, sequence) for domain in missing}


def _bounds(sizes: dict[int, int], options: Options, share: float, sequence: int) -> Bounds:
    """Hold out the first documents in the order of the hashes, or the last.

    Args:
        sizes: bytes of every text, by its hash.
        options: of the preparation.
        share: of the text that is wanted.
        sequence: bytes that are needed at least.
    """
    order = sorted(sizes)
    first = _count_held_out([sizes[digest] for digest in order], share, sequence)
    last = _count_held_out([sizes[digest] for digest in reversed(order)], share, sequence)
    cut = order[first] if first else order[-last] if last else 0
    low, high = [0, cut], [cut, HASHES]
    validation, pretrain, *others = options.splits
    held_out, trained = (high, low) if last and not first else (low, high)
    return {validation: held_out, pretrain: trained} | dict.fromkeys(others, [HASHES, HASHES])


def _count_held_out(sizes: list[int], share: float, sequence: int) -> int:
    """How many of these documents are held out; 0 where they are too short, or too much of all."""
    total, taken, count = sum(sizes), 0, 0
    for size in sizes:
        if taken >= max(sequence, share * total) or taken + size > total / 2:
            break
        taken, count = taken + size, count + 1
    return count if taken >= sequence else 0
