"""Errors of settings say what was given, what is allowed, and what was probably meant."""

import numpy
import pytest

from apex_composer.settings import (
    check_choice,
    check_finite,
    check_flag,
    check_keys,
    check_not_negative,
    check_positive,
    check_same,
    check_threshold,
)


@pytest.mark.parametrize("value", ["auto", "skip"])
def test_an_allowed_choice_passes(value):
    check_choice("kv_heads", value, ("auto", "expand", "skip"))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("expnad", "kv_heads: got 'expnad', allowed: auto, expand, skip. Did you mean 'expand'?"),
        ("both", "kv_heads: got 'both', allowed: auto, expand, skip."),
        (None, "kv_heads: got None, allowed: auto, expand, skip."),
        (True, "kv_heads: got True, allowed: auto, expand, skip."),
    ],
)
def test_another_choice_is_refused(value, told):
    with pytest.raises(ValueError) as error:
        check_choice("kv_heads", value, ("auto", "expand", "skip"))
    assert str(error.value) == told


@pytest.mark.parametrize("value", [0, 1, 1.0, numpy.bool_(True), numpy.str_("auto"), "true"])
def test_what_only_equals_a_choice_is_refused(value):
    with pytest.raises(ValueError, match="^fused_swiglu: got .*, allowed: True, False, auto"):
        check_choice("fused_swiglu", value, (True, False, "auto"))


def test_known_keys_pass():
    check_keys("apex", {"threshold": 1}, ("threshold", "stages"))
    check_keys("apex", {}, ("threshold", "stages"))


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("treshold", "unknown key 'treshold'. Did you mean 'threshold'? Known: threshold, stages"),
        ("wholly_other", "unknown key 'wholly_other'. Known: threshold, stages"),
    ],
)
def test_an_unknown_key_is_refused(key, told):
    with pytest.raises(TypeError) as error:
        check_keys("apex", {"stages": 3, key: 0.1}, ("threshold", "stages"))
    assert str(error.value) == f"apex: {told}"


@pytest.mark.parametrize("threshold", [1e-6, 0.125, 0.1875, 0.5, numpy.float32(0.125)])
def test_thresholds_up_to_a_half_pass(threshold):
    assert check_threshold(threshold) == threshold
    assert type(check_threshold(threshold)) is float


@pytest.mark.parametrize(
    "threshold", [0, 0.0, -0.1, 0.51, 1, True, "0.1", None, float("nan"), float("inf")]
)
def test_other_thresholds_are_refused(threshold):
    with pytest.raises(ValueError, match=r"^threshold: got .*, allowed: a number in \(0, 0\.5\]"):
        check_threshold(threshold)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1, int),
        (30_000_000, int),
        (1, float),
        (0.5, float),
        (numpy.int64(3), int),
        (numpy.int64(3), float),
        (numpy.float32(0.5), float),
    ],
)
def test_positive_numbers_pass_as_plain_ones(value, kind):
    """A checkpoint keeps them, and torch's safe loading refuses numpy's numbers."""
    found = check_positive("tokens", value, kind)
    assert found == value and type(found) is kind


@pytest.mark.parametrize("value", [0, -1, 1.5, 1.0, True, "3", None, numpy.bool_(True), 10**400])
def test_what_is_no_positive_integer_is_refused(value):
    with pytest.raises(ValueError, match=r"^tokens: got .*, allowed: a positive int$"):
        check_positive("tokens", value)


@pytest.mark.parametrize(
    "value", [0, -0.5, True, "3", None, float("nan"), float("inf"), numpy.float64("inf"), 10**400]
)
def test_what_is_no_positive_float_is_refused(value):
    with pytest.raises(ValueError, match=r"^scale: got .*, allowed: a positive float$"):
        check_positive("scale", value, float)


@pytest.mark.parametrize("value", [0, 17, 2**32, numpy.int64(7)])
def test_integers_from_zero_on_pass(value):
    found = check_not_negative("seed", value)
    assert found == value and type(found) is int
    assert check_not_negative("status", 127, highest=127) == 127


@pytest.mark.parametrize("value", [-1, "a", "1", 2.5, 2.0, True, None, float("nan")])
def test_what_is_no_integer_from_zero_on_is_refused(value):
    with pytest.raises(ValueError, match=r"^seed: got .*, allowed: an integer of 0 or more$"):
        check_not_negative("seed", value)
    with pytest.raises(ValueError, match=r"^status: got .*, allowed: an integer from 0 to 127$"):
        check_not_negative("status", 128 if value is None else value, highest=127)


def test_finite_numbers_pass_as_floats():
    for value in (-1, 0, 2.5, numpy.float32(0.5)):
        assert check_finite("margin", value, "a number") == value
        assert type(check_finite("margin", value, "a number")) is float


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), True, "1", None, 10**400])
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(ValueError, match="^margin: got .*, allowed: a number or null$"):
        check_finite("margin", value, "a number or null")


def test_a_number_below_the_lowest_is_refused():
    assert check_finite("lr", 0, "0 or more", lowest=0.0) == 0.0
    with pytest.raises(ValueError, match="^lr: got -0.1, allowed: 0 or more$"):
        check_finite("lr", -0.1, "0 or more", lowest=0.0)


@pytest.mark.parametrize("value", [True, False])
def test_flags_pass(value):
    check_flag("expansion", value)


@pytest.mark.parametrize("value", [0, 1, "false", None])
def test_what_is_no_flag_is_refused(value):
    with pytest.raises(ValueError, match=r"^expansion: got .*, allowed: true, false$"):
        check_flag("expansion", value)


def test_a_resumed_setting_must_be_the_same():
    check_same("stages", ["3ba"], ["3ba"])
    with pytest.raises(ValueError, match="^threshold: .* with 0.125, this run says 0.25") as error:
        check_same("threshold", 0.125, 0.25)
    assert "Set it back to 0.125" in str(error.value)
    assert "load_weights_only" in str(error.value)
