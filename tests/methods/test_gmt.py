"""Which entries have the largest gradients, and what training them alone does."""

import pytest
import torch
from composer import Callback
from composer_run import make_trainer
from helpers import largest as largest_places
from helpers import tiny_llama
from torch.optim import SGD, AdamW

from apex_composer.methods.gmt import GMT, largest

SHARES = [0.01, 0.3, 0.6, 0.99]


def places(mask: torch.Tensor) -> set[int]:
    return set(mask.flatten().nonzero().flatten().tolist())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_mask_is_that_of_a_stable_sort(dtype):
    """Several tensors at once, with ties, zeros and infinities."""
    torch.manual_seed(0)
    tensors = [torch.randn(7, 5), torch.randn(64).mul(2).round(), torch.zeros(3, 3)]
    tensors.append(torch.tensor([1.0, -torch.inf, -0.0, 2.0, -2.0, torch.inf]))
    tensors = [tensor.to(dtype) for tensor in [*tensors, torch.tensor(3.0)]]
    for share in SHARES:
        counts = [max(1, round(share * tensor.numel())) for tensor in tensors]
        for tensor, count, kept in zip(tensors, counts, largest(tensors, counts), strict=True):
            assert kept.shape == tensor.shape
            assert places(kept) == largest_places(tensor.abs().flatten().tolist(), count)


def test_a_gradient_that_is_no_number_is_kept_for_all_to_see():
    gradient = torch.tensor([1.0, torch.nan, 3.0, -4.0])
    (kept,) = largest([gradient], [2])
    assert kept.tolist() == [False, True, False, True]


class Gradients(Callback):
    """The gradients of every batch as they are used, and the weights before."""

    def __init__(self):
        self.seen, self.weights = [], []

    def before_train_batch(self, state, logger):
        self.weights.append({n: p.detach().clone() for n, p in state.model.named_parameters()})

    def after_train_batch(self, state, logger):
        self.seen.append({n: p.grad.clone() for n, p in state.model.named_parameters()})


def train(*algorithms, **options) -> Gradients:
    gradients = Gradients()
    trainer = make_trainer(*algorithms, callbacks=(gradients,), **options)
    trainer.fit()
    trainer.close()
    gradients.before_train_batch(trainer.state, None)
    return gradients


def test_what_is_masked_does_not_move_by_a_bit_under_sgd():
    """The gradient is that of a run without the mask, over all microbatches, and the rest zero."""
    settings = {"optimizer": SGD, "settings": {"lr": 0.1}, "microbatch": 2, "max_duration": "3ba"}
    found = train(GMT(share=0.3), **settings)
    whole = train(**{**settings, "max_duration": "1ba"}).seen[0]
    for name, gradient in whole.items():
        count = max(1, int(0.3 * gradient.numel() + 0.5))
        kept = torch.zeros(gradient.numel(), dtype=torch.bool)
        kept[sorted(largest_places(gradient.abs().flatten().tolist(), count))] = True
        masked = gradient * kept.view_as(gradient)
        assert torch.equal(found.seen[0][name], masked), name
    for step, gradients in enumerate(found.seen):
        for name, gradient in gradients.items():
            before, after = (found.weights[at][name] for at in (step, step + 1))
            assert torch.equal(before[gradient == 0], after[gradient == 0]), name
            torch.testing.assert_close(after, before - 0.1 * gradient, rtol=1e-6, atol=1e-8)
            assert (gradient != 0).sum() <= max(1, int(0.3 * gradient.numel() + 0.5))
    moved = found.weights[0]["model.lm_head.weight"] != found.weights[-1]["model.lm_head.weight"]
    assert 0.3 < moved.float().mean() < 0.9  # other entries in other batches


def test_adamw_moves_masked_entries_by_momentum_alone():
    """Not in the first step, without weight decay; later on by what came before."""
    settings = {"lr": 0.01, "eps": 1e-8, "weight_decay": 0.0}
    found = train(GMT(share=0.3), optimizer=AdamW, settings=settings, max_duration="2ba")
    coasting = 0
    for name, gradient in found.seen[0].items():
        start, first, second = (weights[name] for weights in found.weights)
        assert torch.equal(start[gradient == 0], first[gradient == 0]), name
        assert not torch.equal(start, first)
        only_before = (gradient != 0) & (found.seen[1][name] == 0)
        coasting += int((first != second)[only_before].sum())
    assert coasting > 100


def test_tied_weights_have_one_mask():
    found = train(
        GMT(share=0.5), model=tiny_llama(tie_word_embeddings=True), max_duration="1ba"
    ).seen[0]
    assert [name for name in found if "embed" in name or "lm_head" in name] == [
        "model.model.embed_tokens.weight"
    ]
    gradient = found["model.model.embed_tokens.weight"]
    assert (gradient != 0).float().mean() == 0.5
