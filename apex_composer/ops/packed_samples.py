"""Packed rows: several sequences in one row, each of which counts as a sample of its own (eq. 3).

Shape legend
    B rows, S tokens of a row
    R runs: consecutive tokens of a row that belong to one sequence, or to none (padding)
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedSamples:
    """Which tokens of a microbatch make up its samples.

    Attributes:
        lengths: [R] int64, tokens of each run, row by row: B * S in all.
        kept: [R] int64, how many of them count; 0 in a run of padding, which is no sample.
        counted: [B, S] bool, the tokens that count.
        tokens: how many count in all.
    """

    lengths: Tensor
    kept: Tensor
    counted: Tensor
    tokens: int

    @property
    def valid(self) -> Tensor:
        """Which runs are samples, [R] bool."""
        return self.kept > 0


def is_packed(sequence_id: Tensor) -> bool:
    """Whether a row has several sequences (waits for the device that the ids are on).

    Args:
        sequence_id: [B, S], see `find_samples`.
    """
    first, second = sequence_id[:, :-1], sequence_id[:, 1:]
    return bool(((first != second) & (first >= 0) & (second >= 0)).any())


@torch.no_grad()
def find_samples(sequence_id: Tensor, attention_mask: Tensor | None = None) -> PackedSamples:
    """The samples of packed rows; waits for the device once, for how many there are.

    Args:
        sequence_id: [B, S] integers, equal for the tokens of one sequence, which follow each other
            in a row; negative for padding. llm-foundry's batches have it.
        attention_mask: [B, S], true (1) for tokens that count; default all.
    """
    counted = sequence_id >= 0
    if attention_mask is not None:
        counted = counted & attention_mask.bool()
    begins = torch.ones_like(counted)
    begins[:, 1:] = sequence_id[:, 1:] != sequence_id[:, :-1]
    runs = begins.flatten().cumsum(0) - 1
    count, tokens = torch.stack([runs[-1] + 1, counted.sum()]).tolist()
    lengths, kept = runs.new_zeros(2, count)
    lengths.index_add_(0, runs, torch.ones_like(runs))
    kept.index_add_(0, runs, counted.flatten().to(runs.dtype))
    return PackedSamples(lengths, kept, counted, tokens)
