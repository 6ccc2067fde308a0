import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from corpus import write_corpus
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tiny_run import SEQUENCE, composer, write_model, write_shards

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


# The forms of issue A, each trained from llm-foundry's own entry. One process runs them all, since
# most of a run's time is imports.
FORMS = {
    "list": ["apex"],
    "null": {"apex": None},
    "settings": {"apex": {"threshold": 0.25}},
    "clipping_after": ["apex", {"gradient_clipping": CLIPPING}],
    "clipping_before": [{"gradient_clipping": CLIPPING}, "apex"],
}

# llm-foundry's scripts/train/train.py, but for a loop over YAMLs and what the tests want to know.
SCRIPT = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from llmfoundry.command_utils import train_from_yaml

if __name__ == "__main__":
    report = {}
    for path in sys.argv[1:]:
        trainer = train_from_yaml(path)
        algorithms = trainer.state.algorithms
        apex = next(one for one in algorithms if type(one).__name__ == "APEX")
        weights = trainer.state.model.state_dict()
        report[Path(path).stem] = {
            "algorithms": [type(one).__name__ for one in algorithms],
            "threshold": apex.threshold,
            "stages": len(apex.history),
            "batches": trainer.state.timestamp.batch.value,
            "weights": {name: weight.double().sum().item() for name, weight in weights.items()},
        }
        trainer.close()
    Path("report.json").write_text(json.dumps(report))
"""


def llmfoundry_config(folder: Path, algorithms) -> dict:
    """What a llm-foundry user has before meeting this project, but for `algorithms`."""
    loader = {
        "name": "text",
        "dataset": {"local": str(folder / "data"), "shuffle": True, "max_seq_len": SEQUENCE},
        "drop_last": True,
        "num_workers": 0,
        "prefetch_factor": None,
        "persistent_workers": False,
    }
    return {
        "max_seq_len": SEQUENCE,
        "seed": 17,
        "precision": "fp32",
        "model": {
            "name": "hf_causal_lm",
            "pretrained_model_name_or_path": str(folder / "model"),
            "config_overrides": {"max_position_embeddings": SEQUENCE},
        },
        "tokenizer": {"name": str(folder / "model"), "kwargs": {"model_max_length": SEQUENCE}},
        "train_loader": loader,
        "optimizer": {"name": "decoupled_adamw", "lr": 1.0e-3},
        "scheduler": {"name": "constant_with_warmup", "t_warmup": "0ba"},
        "algorithms": algorithms,
        "max_duration": "3ba",
        "global_train_batch_size": 4,
        "device_train_microbatch_size": 2,
        "device_eval_batch_size": 2,
        "python_log_level": None,
        "log_config": False,
    }


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """What every form of FORMS led to, trained in one process."""
    folder = tmp_path_factory.mktemp("forms")
    (folder / "train.py").write_text(SCRIPT)
    write_model(folder / "model")
    for form, algorithms in FORMS.items():
        # Shards of its own per run: streaming refuses a folder that a living dataset still uses.
        write_shards(folder / form / "data")
        (folder / form / "model").symlink_to(folder / "model")
        config = llmfoundry_config(folder / form, algorithms)
        (folder / f"{form}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    composer(folder / "train.py", [folder / f"{form}.yaml" for form in FORMS], folder)
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("form", FORMS)
def test_llmfoundry_trains_with_every_form(report, form):
    assert report[form]["batches"] == 3
    assert report[form]["stages"] == 3
    assert report[form]["threshold"] == (0.25 if form == "settings" else 0.125)


def test_the_forms_without_settings_are_the_same_run(report):
    assert report["list"]["weights"] == report["null"]["weights"]
    assert report["settings"]["weights"] != report["list"]["weights"]


def test_the_place_of_gradient_clipping_makes_no_difference(report):
    after, before = report["clipping_after"], report["clipping_before"]
    assert {"APEX", "GradientClipping"} <= set(after["algorithms"])
    assert before["weights"] == after["weights"]
    assert after["weights"] != report["list"]["weights"], "clipping had no effect"


class FakeTokenizer:
    """The one attribute of a fast tokenizer that the check reads."""

    def __init__(self, description: str):
        self.backend_tokenizer = SimpleNamespace(to_str=lambda: description)


def state_with(folder, description: str, *, vocabulary: int, length: int, evaluated=False):
    """A run that streams `folder`, as far as the check looks at it."""
    streams = [SimpleNamespace(local=str(folder), remote=None)]
    dataset = SimpleNamespace(streams=streams, max_seq_len=length)
    loader = SimpleNamespace(dataset=dataset)
    other = SimpleNamespace(dataset=None)
    evaluator = SimpleNamespace(
        dataloader=SimpleNamespace(dataloader=loader if evaluated else other)
    )
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=vocabulary))
    return SimpleNamespace(
        train_dataloader=other if evaluated else loader,
        evaluators=[evaluator],
        model=SimpleNamespace(model=model, tokenizer=FakeTokenizer(description)),
    )


def test_prepared_data_is_compared_with_the_run(tmp_path):
    from transformers import AutoTokenizer

    from apex_composer.demo.from_scratch import prepare_from_scratch
    from apex_composer.trainer.config_transform import PreparedData

    write_corpus(tmp_path / "text")
    out = tmp_path / "data"
    prepare_from_scratch(tmp_path / "text", out, vocabulary_size=300, sequence_length=32)
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    description = tokenizer.backend_tokenizer.to_str()
    shards = out / "train" / "train" / "book"
    check = PreparedData().fit_start
    check(state_with(shards, description, vocabulary=300, length=32), None)
    for changed, told in (
        ({"length": 64}, "32 tokens, max_seq_len is 64"),
        ({"vocabulary": 200}, "300 tokens, the model's has 200"),
        ({"description": description.replace('"e"', '"\\u00e9"', 1)}, "tokenizer"),
    ):
        settings = {"description": description, "vocabulary": 300, "length": 32, **changed}
        with pytest.raises(ValueError, match=told):
            check(state_with(shards, settings.pop("description"), **settings), None)
    with pytest.raises(ValueError, match="max_seq_len is 64"):
        check(state_with(shards, description, vocabulary=300, length=64, evaluated=True), None)
    check(state_with(tmp_path / "elsewhere", description, vocabulary=1, length=1), None)


def test_prepared_data_is_compared_once_and_as_early_as_it_is_known(monkeypatch, tmp_path):
    from apex_composer.data_prep.write import manifest
    from apex_composer.trainer.config_transform import PreparedData

    compared = []
    monkeypatch.setattr(manifest, "check_manifest", lambda local, *_, **__: compared.append(local))
    state = state_with(tmp_path / "built", "{}", vocabulary=1, length=1)
    callback = PreparedData()
    callback.before_load(state, None)
    assert compared == [str(tmp_path / "built")]
    callback.fit_start(state, None)
    assert len(compared) == 1
    # A loader that comes with fit() is compared by the algorithm before its first assessment.
    state.train_dataloader = state_with(
        tmp_path / "fit", "{}", vocabulary=1, length=1
    ).train_dataloader
    callback.check_fit(state)
    callback.fit_start(state, None)
    assert compared == [str(tmp_path / "built"), str(tmp_path / "fit")]


@pytest.mark.numeric
def test_a_run_without_apex_may_have_the_same_swiglu():
    from composer import Callback
    from composer_run import run
    from helpers import CHANGE_BOUND, SMOOTH_EPS, change_error, tiny_llama
    from llmfoundry.utils.builders import build_callback

    from apex_composer.trainer.config_transform import FusedSwiGLUCallback

    _, expected, _ = run(eps=SMOOTH_EPS)
    callback = build_callback("fused_swiglu")
    assert isinstance(callback, FusedSwiGLUCallback) and callback.setting is True
    fused = []

    class Watch(Callback):
        def batch_start(self, state, logger):
            fused.append(len(callback._fused.modules))

    _, weights, _ = run(callbacks=(callback, Watch()), eps=SMOOTH_EPS)
    assert fused == [2] * 6  # both layers, in all batches
    for name, start in tiny_llama().state_dict().items():
        assert change_error(weights[name], expected[name], start) < CHANGE_BOUND, name
    assert callback._fused.modules == {}  # given back when the trainer closed
    run(callbacks=(FusedSwiGLUCallback("auto"),))


def test_settings_of_the_swiglu_callback_are_checked_at_once():
    from apex_composer.trainer.config_transform import FusedSwiGLUCallback

    for wrong in (0, 1, "yes", None):
        with pytest.raises(ValueError, match="fused_swiglu: setting: got .*True, False, auto"):
            FusedSwiGLUCallback(wrong)
    with pytest.raises(TypeError, match="Did you mean 'setting'"):
        FusedSwiGLUCallback(settings=True)
