"""Which tokens of packed rows make up which samples."""

import pytest
import torch

from apex_composer.ops.packed_samples import find_samples, is_packed

IDS = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 1, 1, -1, -1], [-1, -1, -1, -1, -1, -1]])


def test_runs_of_one_sequence_are_samples():
    found = find_samples(IDS)
    assert found.lengths.tolist() == [3, 2, 1, 2, 2, 2, 6]
    assert found.kept.tolist() == [3, 2, 1, 2, 2, 0, 0]
    assert found.valid.tolist() == [True] * 5 + [False] * 2
    assert torch.equal(found.counted, IDS >= 0) and found.tokens == 10


def test_masked_tokens_belong_to_their_run_but_do_not_count():
    """A row of text_data's ids goes on over the padding; the mask tells."""
    mask = torch.ones_like(IDS)
    mask[0, 1], mask[0, 5] = 0, 0
    found = find_samples(IDS, mask)
    assert found.lengths.tolist() == [3, 2, 1, 2, 2, 2, 6]
    assert found.kept.tolist() == [2, 2, 0, 2, 2, 0, 0]
    assert found.tokens == 8


@pytest.mark.parametrize(
    ("ids", "packed"),
    [
        (IDS, True),
        (IDS[1:], True),
        (IDS[2:], False),
        (torch.tensor([[0, 0, -1], [-1, 0, 0], [0, 0, 0]]), False),  # a finetuning batch
        (torch.tensor([[4, 4, 4]]), False),
        (torch.tensor([[0], [1]]), False),
    ],
)
def test_rows_of_one_sequence_are_not_packed(ids, packed):
    assert is_packed(ids) == packed
