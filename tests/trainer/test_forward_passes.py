"""Packed batches of llm-foundry under Composer: before training and in it, sequences count."""

import pytest
import torch
from composer_run import BATCH_SIZE, run
from helpers import TokenDataset, tiny_llama
from torch.utils.data import DataLoader

from apex_composer import APEX

# Sequences of 3, 4 and 1 tokens, and of 2 and 3 before padding, in turns.
ROWS = ([0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 1, 1, 1, -1, -1, -1])


class PackedDataset(TokenDataset):
    """Rows with `sequence_id`, as llm-foundry's packing collator makes them."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = super().__getitem__(index)
        ids = torch.tensor(ROWS[index % 2])
        return {**item, "sequence_id": ids, "attention_mask": (ids >= 0).long()}


def norms_by_hand(dataset, layer: int) -> torch.Tensor:
    """Sum over a batch's sequences of the channels' norms, [channels], in float64."""
    model, found = tiny_llama(dtype=torch.float64), []
    probe = model.model.layers[layer].mlp.down_proj
    probe.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    batch = [dataset[i] for i in range(BATCH_SIZE)]
    ids, mask = (torch.stack([b[k] for b in batch]) for k in ("input_ids", "attention_mask"))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    return sum(
        found[0][row][item["sequence_id"] == sequence].square().sum(0).sqrt()
        for row, item in enumerate(batch)
        for sequence in range(int(item["sequence_id"].max()) + 1)
    )


@pytest.mark.numeric
@pytest.mark.parametrize("microbatch", [BATCH_SIZE, 1])
def test_packed_sequences_count_before_training_and_in_it(microbatch):
    dataset = PackedDataset(24)
    loader = DataLoader(dataset, batch_size=BATCH_SIZE)
    options = {"loader": loader, "max_duration": "1ba", "microbatch": microbatch}
    model = tiny_llama(dtype=torch.float64)
    apex, _, _ = run(APEX(stages=1, expansion=False), model=model, **options)
    sequences = 5 * BATCH_SIZE // 2
    assert apex.history[0]["samples"] == sequences
    state = apex._expander.state_dict()["scores"]
    for layer in range(2):
        _, sums, samples = state[f"model.model.layers.{layer}.mlp.channels"]
        assert samples == sequences
        torch.testing.assert_close(sums, norms_by_hand(dataset, layer), rtol=1e-11, atol=0)
