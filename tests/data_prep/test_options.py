from dataclasses import asdict

import pytest

from apex_composer.data_prep.errors import SettingsError
from apex_composer.data_prep.options import Options, parse_amount, read_options


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2M", 2_000_000),
        ("4B", 4 * 10**9),
        ("0.5k", 500),
        ("17", 17),
        ("1_000", 1000),
        ("1t", 10**12),
    ],
)
def test_amounts_have_units(text, number):
    assert parse_amount(text) == number


@pytest.mark.parametrize("text", ["", "M", "-3", "2 MB", "1e9", "nan"])
def test_other_amounts_are_refused(text):
    with pytest.raises(SettingsError, match="Give a number such as"):
        parse_amount(text)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("sequence_length", 1), ("val_tokens", 100), ("cpt_tokens", 4095), ("piece_bytes", 0),
        ("max_reject_rate", 1.0), ("compression", "gz"), ("shard_bytes", 10),
        ("estimate_margin", 0.9), ("shard_bytes", 1 << 40),
    ],
)  # fmt: skip
def test_options_are_checked_at_once_and_named(option, value):
    with pytest.raises(SettingsError, match=f"{option}="):
        Options(**{option: value})


def test_splits_follow_from_the_budgets():
    assert Options().budgets == {"validation": 2_000_000, "train": None}
    both = Options(train_tokens=4 * 10**9, cpt_tokens=10**10).budgets
    assert list(both) == ["validation", "train", "cpt"] and both["train"] == 4 * 10**9
    assert Options(val_tokens=None, cpt_tokens=10**10).budgets == {"cpt": 10**10}
    assert Options().takes_all and not Options(train_tokens=5000).takes_all


def test_options_of_earlier_versions_are_read_but_for_those_of_their_demo():
    options = Options(proportions={"cc": 1.0}, streams_folder="/x")
    former = {"shares": None, "text_limit": None, "tokenizer_training": {}}
    assert read_options(asdict(options)) == read_options(asdict(options) | former) == options
    with pytest.raises(SettingsError, match="text_limit=9: the demo of an earlier version"):
        read_options(asdict(options) | former | {"text_limit": 9})
