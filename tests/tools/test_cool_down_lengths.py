"""The lengths and rates of a cool-down: what is exact, and what is refused."""

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_composer.tools.checkpoint_file import CheckpointFile
from apex_composer.tools.cool_down import cool_down, multiplier

LR = 3e-3


def at(rates=((LR, LR),), epoch_batches=None, **clock) -> CheckpointFile:
    """A run without APEX of 10 batches, each of 4 samples of 8 tokens."""
    clock = {"epoch": 0, "batch": 10, "sample": 40, "token": 320} | clock
    return CheckpointFile(Path("c.pt"), {}, clock, epoch_batches, list(rates))


BATCHES = {"max_seq_len": 8, "global_train_batch_size": 4}


@pytest.mark.parametrize(
    ("max_duration", "cooldown", "epoch_batches", "found"),
    [
        ("100ba", "5ba", None, ("15ba", "5ba")),
        ("100ba", "0.07dur", None, ("17ba", "7ba")),
        ("100ba", "64tok", None, ("12ba", "2ba")),
        ("1000tok", "2ba", None, ("384tok", "64tok")),
        ("1000tok", "3sp", None, ("344tok", "24tok")),
        ("100sp", "2ba", None, ("48sp", "8sp")),
        ("100sp", "0.1dur", None, ("50sp", "10sp")),
        ("3ep", "5ba", None, ("15ba", "5ba")),
        ("3ep", "0.5dur", 8, ("22ba", "12ba")),
        (3, "1ep", 8, ("18ba", "8ba")),  # as Composer takes a number
        ("1000tok", "1ep", 8, ("576tok", "256tok")),
    ],
)
def test_every_length_that_is_exact(max_duration, cooldown, epoch_batches, found):
    config = BATCHES | {"max_duration": max_duration}
    settings = cool_down(at(epoch_batches=epoch_batches), config, cooldown)
    assert (settings["max_duration"], settings["scheduler"]["t_decay"]) == found


@pytest.mark.parametrize(
    ("max_duration", "cooldown", "told"),
    [
        ("100ba", "0.005dur", "^--cooldown: got 0.005dur, which is 0.5ba, .*a whole number of ba"),
        ("100ba", "40tok", "which is 1.25ba"),
        ("100ba", "1ep", "saved in the first epoch and does not tell .* give it in ba"),
        ("100ba", "0ba", "^--cooldown: got '0ba', allowed: a Composer time string"),
        ("100ba", "2000", "^--cooldown: got '2000'"),
        ("1h", "2ba", "^max_duration: got 1h, allowed with --cooldown: ba, sp, tok, ep"),
    ],
)
def test_lengths_that_are_not_exact_are_refused(max_duration, cooldown, told):
    with pytest.raises(ValueError, match=told):
        cool_down(at(), BATCHES | {"max_duration": max_duration}, cooldown)


def test_batches_of_unequal_size_are_not_converted():
    config = BATCHES | {"max_duration": "1000tok"}
    with pytest.raises(ValueError, match="not all batches have 32tok .after 10 batches .* 311tok"):
        cool_down(at(token=311), config, "2ba")
    with pytest.raises(ValueError, match="the YAML has no .*: give it in tok"):
        cool_down(at(), {"max_duration": "1000tok"}, "2ba")


@given(st.floats(1e-7, 1), st.floats(1e-6, 2), st.floats(0.1, 10))
def test_the_rates_are_found_again_bit_for_bit(lr, share, ratio):
    parent = at(rates=[(lr * share, lr)])
    assert lr * multiplier(parent) == lr * share
    groups = at(rates=[(lr * share, lr), (lr * ratio * share, lr * ratio)])
    assert Fraction(multiplier(groups)) == pytest.approx(Fraction(share), rel=1e-15)


def test_a_short_share_is_found_as_it_was_written():
    assert multiplier(at(rates=[(1e-4 * 0.4, 1e-4), (3e-4 * 0.4, 3e-4)])) == 0.4


@pytest.mark.parametrize(
    ("rates", "told"),
    [
        ([], "holds no state of an optimizer .save_ignore_keys."),
        ([(0.0, 1e-3)], "the learning rate is 0 there, and nothing can decay from it"),
        ([(1e-3, 1e-3), (1e-3, 2e-3)], r"param groups have \[1.0, 0.5\] of their base"),
    ],
)
def test_rates_that_cannot_decay_are_refused(rates, told):
    with pytest.raises(ValueError, match=told):
        multiplier(at(rates=rates))
