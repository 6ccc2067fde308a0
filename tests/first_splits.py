"""How splits were chosen while hashes had 64 bits: of all documents at once, by their order.

What `choose_splits` has to agree with, for whatever was begun at that time.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from apex_composer.data_prep.choose.splits import BEYOND, DUPLICATE, UNIQUE, Want
from apex_composer.data_prep.errors import ShortfallError

# Hashes that are looked up at a time, to bound the memory.
AT_ONCE = 1 << 20


def choose_splits_before(
    hashes: np.ndarray,
    lengths: np.ndarray,
    owners: np.ndarray,
    domains: Sequence[str],
    wants: Mapping[str, Want],
) -> np.ndarray:
    """As `choose_splits`, of hashes that are uint64 [n]."""
    codes = np.full(len(hashes), BEYOND, dtype=np.int8)
    taken = np.empty(0, dtype=np.uint64)
    missing: dict[str, str] = {}
    members = [np.flatnonzero(owners == index) for index in range(len(domains))]
    for code, (name, want) in enumerate(wants.items()):
        chosen_before = taken
        for domain, member in zip(domains, members, strict=True):
            free = member[codes[member] == BEYOND]
            free = free[~_contained(hashes[free], chosen_before)]
            free = free[np.argsort(hashes[free], kind="stable")]
            if name == UNIQUE:  # the first copy in the order of the input
                free = free[_first_copies(hashes[free])]
            chosen = _take(hashes[free], lengths[free], want, domain)
            if chosen is None:
                have, need = int(lengths[free].sum()), want[domain]
                missing[domain] = f"{name}/{domain} needs {need:,} tokens and has {have:,}"
                continue
            codes[free[:chosen]] = code
            if name == UNIQUE:
                chosen_before = np.union1d(chosen_before, hashes[member[codes[member] == code]])
        taken = np.union1d(taken, hashes[codes == code])
    if missing:
        raise ShortfallError("; ".join(missing.values()), list(missing))
    for member in members:
        left = member[codes[member] == BEYOND]
        codes[left[_contained(hashes[left], taken)]] = DUPLICATE
    return codes


def _contained(values: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Which values are among sorted ones; np.isin would sort copies of both."""
    found = np.zeros(len(values), dtype=bool)
    if len(taken):
        for start in range(0, len(values), AT_ONCE):
            part = values[start : start + AT_ONCE]
            places = np.minimum(np.searchsorted(taken, part), len(taken) - 1)
            found[start : start + AT_ONCE] = taken[places] == part
    return found


def _first_copies(ordered: np.ndarray) -> np.ndarray:
    return np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]


def _take(ordered: np.ndarray, lengths: np.ndarray, want: Want, domain: str) -> int | None:
    """How many of a domain's free documents, sorted by hash, a split takes; None: too few."""
    if want is None:
        return len(ordered)
    if want[domain] == 0:
        return 0
    reached = int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), want[domain]))
    if reached == len(ordered):
        return None
    # Copies of the last text come along: they may not stay behind for another split.
    return int(np.searchsorted(ordered, ordered[reached], side="right"))
