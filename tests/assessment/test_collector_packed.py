"""Packed rows: each sequence counts as the sample that it would be in a row of its own."""

import pytest
import torch
from by_hand import assert_same, make_assessment, tiny_llama, totals_of
from helpers import tokens

from apex_composer import Group
from apex_composer.assessment.collector import Assessment, _say_packed

pytestmark = pytest.mark.numeric

SEQUENCES = [[3, 2, 1], [6], [2, 2, 3], [8], [1, 5]]  # lengths, by row of 8 tokens


def packed_and_unpacked():
    """Sequences in rows of 8 tokens, and each in a row of its own: ids of sequences, positions."""
    rows = [[-1] * 8 for _ in SEQUENCES]
    places = []
    for row, lengths in enumerate(SEQUENCES):
        begin = 0
        for place, length in enumerate(lengths):
            rows[row][begin : begin + length] = [place] * length
            places.append((row, begin, length))
            begin += length
    return torch.tensor(rows), places


def unpack(packed: torch.Tensor, places) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences padded at their ends, and the mask."""
    alone = packed.new_zeros(len(places), 8, *packed.shape[2:])
    mask = torch.zeros(len(places), 8, dtype=torch.bool)
    for sample, (row, begin, length) in enumerate(places):
        alone[sample, :length] = packed[row, begin : begin + length]
        mask[sample, :length] = True
    return alone, mask


def isolated(ids: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Inputs of a Llama whose tokens see those of their own sequence only."""
    same = ids.unsqueeze(2) == ids.unsqueeze(1)
    seen = same & torch.ones(8, 8, dtype=torch.bool).tril()
    hidden = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    first = torch.where(begins, torch.arange(8), 0).cummax(1).values
    return {"attention_mask": hidden.unsqueeze(1), "position_ids": torch.arange(8) - first}


@pytest.mark.parametrize("masked", [False, True])
def test_packed_sequences_count_as_the_unpacked_batch_does(masked):
    model = tiny_llama()
    ids, places = packed_and_unpacked()
    packed = tokens(len(ids))
    with torch.no_grad():
        first, second = make_assessment(model), make_assessment(model)
        with first.assessing(ids >= 0 if masked else None, ids):
            model(packed, **isolated(ids, torch.float64))
        first.remove()
        alone, mask = unpack(packed, places)
        with second.assessing(mask):
            model(alone, attention_mask=mask)
    found, expected = first.totals(), second.totals()
    for name, total in expected.items():
        assert torch.equal(found[name].scores, total.scores), name
        torch.testing.assert_close(found[name].norm_sums, total.norm_sums, rtol=1e-10, atol=0)
        assert found[name].samples == total.samples == len(places)
    # As rows they count otherwise, so the comparison above means something.
    rows = totals_of(model, packed, mask=ids >= 0)
    assert any(not torch.equal(rows[name].scores, t.scores) for name, t in expected.items())


def test_packed_rows_without_padding_in_the_ffn():
    """MPT hands over [tokens, channels]; the probe is fed directly."""
    probe = torch.nn.Linear(4, 2)
    assessment = Assessment([(Group("channels", "channel", 4, 1, probe), 1)])
    ids, places = packed_and_unpacked()
    values = torch.rand(*ids.shape, 4, generator=torch.Generator().manual_seed(0))
    alone, alone_mask = unpack(values, places)
    totals = []
    for activation, own, mask in ((values[ids >= 0], ids, ids >= 0), (alone, None, alone_mask)):
        with assessment.assessing(mask, own):
            probe(activation)
        totals.append(assessment.totals())
        assessment.reset()
    assert_same(*totals)


def test_packed_rows_are_left_to_torch_and_that_is_said_once(caplog):
    group = Group("channels", "channel", 4, 1, torch.nn.Linear(4, 2))
    assessment = Assessment([(group, 1)], implementation="triton")
    ids, _ = packed_and_unpacked()
    _say_packed.cache_clear()
    with caplog.at_level("INFO", "apex_composer.assessment.collector"):
        for _ in range(2):
            assessment.open(sequence_id=ids)
            assert assessment.reserve_norms("channels", torch.ones(*ids.shape, 4)) is None
            assessment.discard()
    assert [record.message for record in caplog.records] == [
        "apex: norms of packed rows by torch, because there is no kernel for them"
    ]
