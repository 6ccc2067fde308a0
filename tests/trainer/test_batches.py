"""What a batch says of its tokens."""

import pytest
import torch

from apex_composer.trainer.batches import attention_mask, count_tokens, look_at, sequence_ids

IDS = torch.zeros(3, 4, dtype=torch.int64)
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_a_batchs_mask_is_boolean(dtype):
    found = attention_mask({"input_ids": IDS, "attention_mask": MASK.to(dtype)})
    assert found.dtype == torch.bool and torch.equal(found, MASK.bool())


@pytest.mark.parametrize("batch", [{"input_ids": IDS}, {"attention_mask": None}, IDS, [IDS, MASK]])
def test_a_batch_may_have_no_mask(batch):
    assert attention_mask(batch) is None


@pytest.mark.parametrize(
    ("batch", "packed"),
    [
        ({"input_ids": IDS, "sequence_id": torch.tensor([[0, 0, 1, -1]] * 3)}, True),
        ({"input_ids": IDS, "sequence_id": MASK - 1}, False),  # every finetuning batch has that
        ({"input_ids": IDS}, False),
        ([IDS, MASK], False),
    ],
)
def test_ids_of_sequences_are_of_use_where_a_row_has_several(batch, packed):
    found = sequence_ids(batch)
    assert found is (batch["sequence_id"] if packed else None)


def test_padding_is_not_counted_as_tokens():
    assert count_tokens({"input_ids": IDS, "attention_mask": MASK}) == 6
    assert count_tokens({"input_ids": IDS}) == 12


@pytest.mark.parametrize(
    ("batch", "layout"),
    [
        ({"input_ids": IDS}, (False, False)),
        ({"input_ids": IDS, "attention_mask": torch.ones_like(MASK)}, (False, False)),
        ({"input_ids": IDS, "attention_mask": MASK}, (True, False)),
        ({"input_ids": IDS, "sequence_id": torch.tensor([[0, 0, 1, 1]] * 3)}, (False, True)),
    ],
)
def test_a_look_at_a_batch_tells_padding_and_packing(batch, layout):
    assert look_at(batch) == layout
