"""Forward passes that must not count: others', recomputed ones, those of batches given up."""

import copy

import pytest
import torch
from by_hand import assert_same, make_assessment, tiny_llama, totals_of
from helpers import tokens

from apex_composer.assessment.scores import GroupTotals

pytestmark = pytest.mark.numeric


def test_a_copy_of_the_model_does_not_count():
    """A teacher or a reference, copied with the hooks: their activations are not this model's."""
    model = tiny_llama()
    found = make_assessment(model)
    other = copy.deepcopy(model)
    with found.assessing():
        model(tokens(6))
        other(tokens(6, seed=1))
    assert_same(found.totals(), totals_of(model, tokens(6)))


def test_forwards_outside_do_not_count():
    model = tiny_llama()
    assessment = make_assessment(model)
    with torch.no_grad():
        model(tokens(3, seed=1))
        with assessment.assessing():
            model(tokens(3))
        model(tokens(3, seed=2))
    assert_same(assessment.totals(), totals_of(model, tokens(3)))


def train_inside(model, ids) -> tuple[dict[str, GroupTotals], int]:
    """Totals of a forward and a backward pass in one block, and how often a probe was called."""
    calls = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda *_: calls.append(1)
    )
    assessment = make_assessment(model)
    with assessment.assessing():
        model(ids, labels=ids).loss.backward()
    assessment.remove()
    handle.remove()
    return assessment.totals(), len(calls)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_of_activation_checkpointing_does_not_count(reentrant):
    ids = tokens(4)
    expected, calls = train_inside(tiny_llama().train(), ids)
    assert calls == 1
    model = tiny_llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found, calls = train_inside(model, ids)
    assert calls == 2, "checkpointing was not at work"
    assert_same(found, expected)


def test_a_batch_that_runs_out_of_memory_counts_once_it_succeeds():
    """Two microbatches of four, then four of two, as Composer retries a batch."""
    model, ids = tiny_llama(), tokens(8)
    assessment = make_assessment(model)
    committed = tokens(2, seed=9)
    with assessment.assessing(), torch.no_grad():
        model(committed)

    def fail(module, inputs):
        raise torch.OutOfMemoryError("simulated")

    def attempt(size: int, failing: int | None = None) -> None:
        for place, microbatch in enumerate(ids.split(size)):
            if place == failing:
                model.model.layers[1].mlp.down_proj.register_forward_pre_hook(fail)
            assessment.open()
            with torch.no_grad():
                model(microbatch)
            assessment.close()

    with pytest.raises(torch.OutOfMemoryError):
        attempt(4, failing=1)
    model.model.layers[1].mlp.down_proj._forward_pre_hooks.popitem()
    assessment.discard()
    attempt(2)
    assessment.commit()
    assert_same(assessment.totals(), totals_of(model, committed, ids))


def test_a_block_that_raises_is_forgotten():
    model, ids = tiny_llama(), tokens(4)
    assessment = make_assessment(model)
    with pytest.raises(torch.OutOfMemoryError), assessment.assessing(), torch.no_grad():
        model(ids)
        raise torch.OutOfMemoryError("simulated")
    assert assessment.totals() == {}
    with torch.no_grad():
        model(ids)  # the block is closed: this does not count
    assert assessment.totals() == {}
    with assessment.assessing(), torch.no_grad():
        model(ids)
    assert_same(assessment.totals(), totals_of(model, ids))


def test_a_forward_that_misses_a_group_is_an_error():
    model = tiny_llama()
    assessment = make_assessment(model)
    model.config.num_hidden_layers = 1  # the second layer is left out
    with (
        pytest.raises(RuntimeError, match=r"did not reach model\.layers\.1\."),
        assessment.assessing(),
    ):
        model(tokens(2))
    assert assessment.totals() == {}
