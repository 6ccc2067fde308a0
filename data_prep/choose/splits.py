"""Choose the split of every document by the order of the documents' hashes.

The order of the hashes is a shuffle that depends on nothing but the texts, so neither the order of
the files nor the number of workers moves a document. Equal texts have equal hashes.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from apex_composer.data_prep.errors import ShortfallError

BEYOND = -1  # in no split: the budgets are filled
DUPLICATE = -2  # in no split: the same text is in an earlier one, or in validation already
# The split that takes every text once, whatever the domain.
UNIQUE = "validation"
# Documents that are sorted at a time, to bound the memory; of very many, their part of RANGES.
AT_ONCE = 1 << 17
RANGES = 64


# What a split takes: tokens per domain, or (None) all that is left.
Want = Mapping[str, int] | None


def choose_splits(
    hashes: np.ndarray,
    lengths: np.ndarray,
    owners: np.ndarray,
    domains: Sequence[str],
    wants: Mapping[str, Want],
) -> np.ndarray:
    """Name the split of every document.

    A document's split depends on texts of smaller hashes only, so ranges of hashes, the smallest
    first, are divided one after the other: sorting all at once would take more than twice the
    memory.

    Args:
        hashes: one of each document, its most significant word first: uint64 [n, words].
        lengths: their tokens: [n].
        owners: their domains, as indices into `domains`: [n].
        domains: names of the domains.
        wants: what each split takes, in the order in which the smallest hashes are given away.

    Returns:
        int8 [n]: indices into `wants`, BEYOND, or DUPLICATE. No text is in two splits.

    Raises:
        ShortfallError: a domain cannot fill its budget; the message names all that cannot.
    """
    codes = np.full(len(hashes), BEYOND, dtype=np.int8)
    taken = {domain: dict.fromkeys(wants, 0) for domain in domains}
    for members in _ranges(hashes[:, 0]):
        order, texts = _sort(hashes[members])
        members = members[order]
        codes[members] = _divide(texts, lengths[members], owners[members], wants, taken)
    missing: dict[str, str] = {}
    for name, want in wants.items():
        for domain, have in taken.items():
            need = 0 if want is None else want[domain]
            if have[name] < need and domain not in missing:
                missing[domain] = f"{name}/{domain} needs {need:,} tokens and has {have[name]:,}"
    if missing:
        raise ShortfallError("; ".join(missing.values()), list(missing))
    return codes


def _ranges(first_words: np.ndarray) -> Iterator[np.ndarray]:
    """Divide the documents into ranges of hashes of about the same number, in their order.

    Yields:
        Documents of the next range, in the order of the input: int64 [m].
    """
    count = min(RANGES, 1 + len(first_words) // AT_ONCE)
    sample = np.sort(first_words[:: 1 + len(first_words) // AT_ONCE])  # of about AT_ONCE
    edges = sample[np.arange(1, count) * len(sample) // count]
    places = np.empty(len(first_words), dtype=np.uint8)
    for start in range(0, len(first_words), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        places[part] = np.searchsorted(edges, first_words[part], side="right")
    for place in range(count):
        yield np.flatnonzero(places == place)


def _sort(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of documents, copies of a text in that of the input, and in it each text's number.

    Args:
        hashes: uint64 [m, words].
    """
    order = np.argsort(hashes[:, 0], kind="stable")
    ordered = hashes[order]
    same = ordered[1:] == ordered[:-1]
    if (same[:, :1] & ~same).any():  # rare, and this sort takes twice the time
        order = np.lexsort(hashes.T[::-1])
        ordered = hashes[order]
        same = ordered[1:] == ordered[:-1]
    return order, np.concatenate([[0], np.cumsum(~same.all(axis=1))])[: len(order)]


def _divide(
    texts: np.ndarray,
    lengths: np.ndarray,
    owners: np.ndarray,
    wants: Mapping[str, Want],
    taken: Mapping[str, dict[str, int]],
) -> np.ndarray:
    """Name the split of every document of a range of hashes, sorted by them: int8 [m].

    Args:
        texts: numbers of their texts, rising: [m].
        lengths: their tokens: [m].
        owners: their domains, as indices into those of `taken`: [m].
        taken: tokens by domain and split, to which those of this range are added.
    """
    codes = np.full(len(texts), BEYOND, dtype=np.int8)
    used = np.zeros(len(texts), dtype=bool)  # by the text's number
    members = [np.flatnonzero(owners == index) for index in range(len(taken))]
    for code, (name, want) in enumerate(wants.items()):
        # Copies in several domains go to one split together, but for UNIQUE.
        used_before = used if name == UNIQUE else used.copy()
        for (domain, have), member in zip(taken.items(), members, strict=True):
            free = member[codes[member] == BEYOND]
            free = free[~used_before[texts[free]]]
            if name == UNIQUE:  # the first copy in the order of the input
                free = free[_first_copies(texts[free])]
            if want is not None:
                left = want[domain] - have[name]
                free = free[: _count(texts[free], lengths[free], left)]
            codes[free] = code
            used[texts[free]] = True
            have[name] += int(lengths[free].sum(dtype=np.int64))
    codes[(codes == BEYOND) & used[texts]] = DUPLICATE
    return codes


def _first_copies(ordered: np.ndarray) -> np.ndarray:
    return np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]


def _count(texts: np.ndarray, lengths: np.ndarray, left: int) -> int:
    """How many of a domain's free documents, sorted, a split takes that lacks `left` tokens."""
    if left <= 0:
        return 0
    reached = int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), left))
    if reached == len(texts):
        return reached
    # Copies of the last text come along: they may not stay behind for another split.
    return int(np.searchsorted(texts, texts[reached], side="right"))
