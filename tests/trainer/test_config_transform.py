"""Every form of `algorithms` becomes the one that llm-foundry takes."""

from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmfoundry.utils.builders import build_algorithm
from llmfoundry.utils.config_utils import (
    TRAIN_CONFIG_KEYS,
    TrainConfig,
    make_dataclass_and_log_config,
)
from omegaconf import OmegaConf

from apex_composer.trainer.config_transform import normalise_algorithms

CLIPPING = {"clipping_type": "norm", "clipping_threshold": 0.1}


@pytest.mark.parametrize(
    ("algorithms", "expected"),
    [
        (["apex"], {"apex": {}}),
        ([{"apex": None}], {"apex": {}}),
        ([{"apex": {"threshold": 0.25}}], {"apex": {"threshold": 0.25}}),
        ({"apex": None}, {"apex": {}}),
        ({"apex": {"threshold": 0.25}}, {"apex": {"threshold": 0.25}}),
        (
            [{"apex": None, "gradient_clipping": CLIPPING}],
            {"apex": {}, "gradient_clipping": CLIPPING},
        ),
        (["apex", {"gradient_clipping": CLIPPING}], {"apex": {}, "gradient_clipping": CLIPPING}),
        ([{"gradient_clipping": CLIPPING}, "apex"], {"gradient_clipping": CLIPPING, "apex": {}}),
        ([], {}),
        ({}, {}),
    ],
)
def test_every_form_becomes_a_mapping_in_the_order_given(algorithms, expected):
    config = {"seed": 17, "algorithms": algorithms}
    before = deepcopy(config)
    normalised = normalise_algorithms(config)
    assert normalised == {"seed": 17, "algorithms": expected}
    assert list(normalised["algorithms"]) == list(expected)
    assert config == before, "the transform changed its argument"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"algorithms": None},
        {"algorithms": "apex"},
        {"algorithms": 3},
        {"algorithms": ["apex", 3]},
        {"algorithms": [["apex"]]},
        {"algorithms": [None]},
    ],
)
def test_other_forms_are_left_to_llmfoundry(config):
    assert normalise_algorithms(config) is config


@pytest.mark.parametrize("config", [None, [], "text"])
def test_what_is_no_configuration_is_returned_as_it_is(config):
    assert normalise_algorithms(config) is config


def test_omegaconf_containers_are_understood_too():
    config = OmegaConf.create({"algorithms": ["apex", {"gradient_clipping": CLIPPING}]})
    normalised = normalise_algorithms(config)
    assert normalised["algorithms"] == {"apex": {}, "gradient_clipping": CLIPPING}


@given(names=st.lists(st.text(min_size=1), unique=True))
def test_a_list_of_names_keeps_all_of_them_in_order(names):
    normalised = normalise_algorithms({"algorithms": names})
    assert list(normalised["algorithms"]) == names
    assert normalise_algorithms(normalised) == normalised


def test_an_algorithm_listed_twice_is_an_error_that_names_it():
    config = {"algorithms": ["apex", {"apex": {"threshold": 0.25}}]}
    with pytest.raises(ValueError, match="algorithms: 'apex' is listed twice"):
        normalise_algorithms(config)


def test_settings_not_indented_below_the_name_are_an_error_that_shows_how():
    config = {"algorithms": [{"apex": None, "threshold": 0.25}]}
    with pytest.raises(ValueError, match=r"- apex: \{threshold: 0.25\}"):
        normalise_algorithms(config)


def test_defaults_that_nobody_merged_are_refused():
    with pytest.raises(ValueError, match=r"defaults: got \['a.yaml'\].*apex-composer show"):
        normalise_algorithms({"defaults": ["a.yaml"], "algorithms": ["apex"]})


# What llm-foundry needs besides; it is not looked at before `algorithms` are.
NEEDED = {
    "max_seq_len": 16,
    "seed": 17,
    "model": {},
    "tokenizer": {},
    "train_loader": {},
    "optimizer": {},
    "scheduler": {},
    "max_duration": "3ba",
    "global_train_batch_size": 4,
    "device_train_microbatch_size": 2,
    "device_eval_batch_size": 2,
}


@pytest.mark.parametrize(
    ("algorithms", "threshold"),
    [
        (["apex"], 0.125),
        ({"apex": None}, 0.125),
        ({"apex": {"threshold": 0.25}}, 0.25),
        (["apex", {"gradient_clipping": CLIPPING}], 0.125),
        ([{"gradient_clipping": CLIPPING}, {"apex": {"threshold": 0.25}}], 0.25),
    ],
)
def test_llmfoundry_builds_every_form(algorithms, threshold):
    """As its `train` does: the transform is found by its entry point, the algorithms by theirs."""
    yaml = OmegaConf.create({**NEEDED, "algorithms": algorithms})
    _, config = make_dataclass_and_log_config(yaml, TrainConfig, TRAIN_CONFIG_KEYS, "all")
    built = {name: build_algorithm(name, given) for name, given in config.algorithms.items()}
    assert built["apex"].threshold == threshold
    assert len(built) == (len(algorithms) if isinstance(algorithms, list) else 1)
