"""Samples that a model is given, and the choice of some of them."""

import hashlib
import heapq
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Sample(NamedTuple):
    """What the model is given at once.

    Args:
        tokens: int64 [length], unpadded.
        answer: where the answer to a prompt stands in them; None where all is text.
    """

    tokens: Tensor
    answer: slice | None = None


def share_out(counts: Mapping[str, int], samples: int | None) -> dict[str, int]:
    """How many samples of each domain: in proportion, by the largest remainder, one at least.

    Raises:
        ValueError: there are fewer samples than domains.
    """
    total = sum(counts.values())
    if samples is None or samples >= total:
        return dict(counts)
    if samples < len(counts):
        raise ValueError(f"samples={samples} must be {len(counts)} at least, one for each domain")
    # One each first; the others in proportion to what is left.
    left, rest = samples - len(counts), max(1, total - len(counts))
    exact = {name: (count - 1) * left / rest for name, count in counts.items()}
    shares = {name: 1 + int(part) for name, part in exact.items()}
    order = sorted(counts, key=lambda name: (int(exact[name]) - exact[name], name))
    for name in order[: samples - sum(shares.values())]:
        shares[name] += 1
    return shares


def rank(seed: int, domain: str, place: int) -> bytes:
    """What decides whether a sample is chosen: the smaller, the sooner."""
    return hashlib.sha256(f"{seed} {domain} {place}".encode()).digest()


class Rows(Sequence):
    """Samples out of rows of tokens, of which some may be chosen.

    Args:
        rows: arrays of tokens, or samples.
        places: those of the rows that count, in their order. Default: all.
        total: how many there were to choose from. Default: all rows.
    """

    def __init__(
        self, rows: Any, places: Sequence[int] | None = None, total: int | None = None
    ) -> None:
        self.rows, self.places = rows, range(len(rows)) if places is None else places
        self.total = len(rows) if total is None else total

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int) -> Sample:
        row = self.rows[self.places[place]]
        return row if isinstance(row, Sample) else Sample(torch.from_numpy(row.astype(np.int64)))

    def choose(self, domain: str, count: int, seed: int) -> "Rows":
        """So many of them, by the hash of their places, in their order."""
        if count >= len(self.places):
            return self
        chosen = heapq.nsmallest(count, self.places, key=lambda place: rank(seed, domain, place))
        return Rows(self.rows, sorted(chosen), self.total)
