"""Random masks: which, how many, and of what they depend."""

import pytest
import torch
from composer import Callback
from composer_run import make_trainer
from torch.optim import SGD

from apex_composer.methods.rmt import RMT, random_mask

CPU = torch.device("cpu")


def test_a_mask_depends_on_the_seed_and_the_names_alone():
    first = random_mask(1000, 0.6, CPU, 7, "rmt", 3, "a")
    torch.manual_seed(1)
    assert torch.equal(first, random_mask(1000, 0.6, CPU, 7, "rmt", 3, "a"))
    for other in ((8, "rmt", 3, "a"), (7, "rmt", 4, "a"), (7, "rmt", 3, "b")):
        share = (first == random_mask(1000, 0.6, CPU, *other)).float().mean()
        assert share == pytest.approx(0.6**2 + 0.4**2, abs=0.08)


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_the_share_is_kept(share):
    kept = random_mask(100_000, share, CPU, 0).float().mean()
    assert kept == pytest.approx(share, abs=4 * (share * (1 - share) / 100_000) ** 0.5)


class Kept(Callback):
    """Which gradients are left in every batch, and the weights before it."""

    def __init__(self):
        self.kept, self.weights = [], []

    def before_train_batch(self, state, logger):
        self.weights.append({n: p.detach().clone() for n, p in state.model.named_parameters()})

    def after_train_batch(self, state, logger):
        self.kept.append({n: p.grad != 0 for n, p in state.model.named_parameters()})


def train(algorithm: RMT, **options) -> Kept:
    kept = Kept()
    sgd = {"optimizer": SGD, "settings": {"lr": 0.1}}
    trainer = make_trainer(algorithm, callbacks=(kept,), max_duration="2ba", **sgd, **options)
    trainer.fit()
    trainer.close()
    kept.before_train_batch(trainer.state, None)
    return kept


def test_the_gradients_of_the_mask_are_left_and_others_do_not_move_by_a_bit():
    found = train(RMT(share=0.3, seed=5))
    for step, kept in enumerate(found.kept):
        for name, own in kept.items():
            wanted = random_mask(own.numel(), 0.3, CPU, 5, "rmt", step, name).view_as(own)
            # Embeddings of tokens that a batch does not have get no gradient.
            assert torch.equal(own, wanted) or ("embed" in name and not (own & ~wanted).any()), name
            before, after = found.weights[step][name], found.weights[step + 1][name]
            assert torch.equal(before[~wanted], after[~wanted]), name
            assert not torch.equal(before, after), name
    first, second = (kept["model.lm_head.weight"] for kept in found.kept)
    assert not torch.equal(first, second)


def test_the_default_seed_is_the_runs():
    weights = [train(RMT(seed=seed)).weights[-1] for seed in (None, 17, 18)]
    name = "model.lm_head.weight"
    assert torch.equal(weights[0][name], weights[1][name])
    assert not torch.equal(weights[0][name], weights[2][name])


def test_a_seed_that_is_none_is_refused():
    with pytest.raises(ValueError, match="rmt: seed: got 'x', allowed: an integer of 0 or more"):
        RMT(seed="x")
