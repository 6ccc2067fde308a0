from pathlib import Path

import pytest
import yaml as pyyaml

from apex_composer.demo.configuration import (
    DEFAULT_YAML,
    build_configurations,
    load_template,
)

DOMAINS = ["arxiv", "github"]


def count_splits(**sequences):
    """Sequences of validation, pretrain and train for each domain that has any there."""
    return {
        split: {
            d: {"sequences": numbers[place]} for d, numbers in sequences.items() if numbers[place]
        }
        for place, split in enumerate(("validation", "pretrain", "train"))
    }


SPLITS = count_splits(arxiv=(1, 8, 8), github=(1, 8, 8))


def build(overrides=(), out="runs/x", precision="fp32", splits=SPLITS, is_watched=True):
    template = load_template(DEFAULT_YAML, Path(out), overrides)
    return build_configurations(template, splits, Path(out) / "data", precision, is_watched)


def differences(left, right, path=""):
    """Dotted paths at which two configurations differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        return {
            found
            for key in left.keys() | right.keys()
            for found in differences(left.get(key), right.get(key), f"{path}.{key}".strip("."))
        }
    return set() if left == right else {path}


def test_vanilla_and_apex_differ_in_the_algorithm_names_and_folders_only():
    runs = build()
    assert differences(runs["vanilla"], runs["apex"]) == {
        "algorithms.apex",
        "run_name",
        "callbacks.hf_checkpointer.save_folder",
    }
    assert "apex" not in runs["vanilla"]["algorithms"]


def test_the_pair_starts_from_the_base_and_the_base_from_nothing():
    runs = build(out="some/where")
    saved = f"{runs['base']['save_folder']}/{runs['base']['save_filename']}"
    assert runs["apex"]["load_path"] == saved == "some/where/base/checkpoint.pt"
    assert runs["apex"]["load_weights_only"] is True
    assert "load_path" not in runs["base"]


def test_the_base_and_the_pair_train_on_different_documents():
    runs = build()
    streams = {run: runs[run]["train_loader"]["dataset"]["streams"] for run in runs}
    assert streams["base"]["arxiv"] == {"local": "runs/x/data/pretrain/train/arxiv", "remote": None}
    assert streams["apex"]["github"] == {"local": "runs/x/data/train/train/github", "remote": None}
    assert streams["vanilla"] == streams["apex"]


def test_a_domain_of_few_documents_is_read_again_and_evaluated_if_it_can_be():
    runs = build(splits=count_splits(arxiv=(1, 9, 9), book=(0, 9, 0), pair=(2, 9, 0)))
    for run in ("base", "vanilla", "apex"):
        assert [loader["label"] for loader in runs[run]["eval_loader"]] == ["arxiv", "pair"]
        streams = runs[run]["train_loader"]["dataset"]["streams"]
        read = {domain: Path(stream["local"]).parents[1].name for domain, stream in streams.items()}
        own = "pretrain" if run == "base" else "train"
        assert read == {"arxiv": own, "book": "pretrain", "pair": "pretrain"}


def test_text_for_less_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="the run 'vanilla' has 7 sequences of 256 tokens"):
        build(splits=count_splits(arxiv=(1, 8, 7)))


def test_every_domain_is_evaluated_under_its_name():
    for settings in build().values():
        assert [loader["label"] for loader in settings["eval_loader"]] == DOMAINS
        streams = [loader["dataset"]["streams"] for loader in settings["eval_loader"]]
        assert streams[0] == {
            "arxiv": {"local": "runs/x/data/validation/train/arxiv", "remote": None},
        }
        assert settings["eval_loader"][0]["dataset"]["shuffle"] is False
        assert settings["train_loader"]["dataset"]["shuffle"] is True


def test_the_continued_runs_are_evaluated_where_they_begin_and_where_they_end():
    runs = build()
    first = {run: settings.get("eval_first") for run, settings in runs.items()}
    assert first == {"base": None, "vanilla": True, "apex": True}
    assert {settings["eval_interval"] for settings in runs.values()} == {"1dur"}


def test_the_stages_of_schedule_and_algorithm_agree_when_changed():
    apex = build(["variables.stages=2", "continued.scheduler.lr_multipliers=[1,0.5]"])["apex"]
    assert apex["scheduler"]["stages"] == apex["algorithms"]["apex"]["stages"] == 2


def test_the_precision_is_that_of_the_machine():
    assert {run["precision"] for run in build(precision="amp_bf16").values()} == {"amp_bf16"}


def test_nothing_is_left_to_resolve():
    for settings in build().values():
        assert "${" not in pyyaml.safe_dump(settings)


def test_a_log_gets_the_state_of_a_run_now_and_then():
    for settings in build(is_watched=False).values():
        assert settings["progress_bar"] is False and settings["log_to_console"] is True
    intervals = [run["console_log_interval"] for run in build(is_watched=False).values()]
    assert intervals == ["160ba", "60ba", "60ba"]
    assert build(["variables.batches=3"], is_watched=False)["apex"]["console_log_interval"] == "1ba"
    assert build()["apex"]["progress_bar"] is True


@pytest.mark.parametrize("is_watched", [True, False])
def test_llm_foundry_knows_every_key(is_watched):
    from llmfoundry.utils.config_utils import (
        TRAIN_CONFIG_KEYS,
        TrainConfig,
        make_dataclass_and_log_config,
    )
    from omegaconf import OmegaConf

    for settings in build(is_watched=is_watched).values():
        _, checked = make_dataclass_and_log_config(
            OmegaConf.create(settings), TrainConfig, TRAIN_CONFIG_KEYS, transforms="all"
        )
        assert checked.device_train_batch_size == 8
        assert [loader["label"] for loader in checked.eval_loaders] == DOMAINS


@pytest.mark.parametrize("override", ["variables.batchs=3", "variables.batches", "x=1", "=1"])
def test_overrides_that_change_nothing_are_refused(override):
    with pytest.raises(ValueError, match="changes nothing"):
        build([override])


def test_overrides_are_taken():
    assert build(["variables.batches=7"])["vanilla"]["max_duration"] == "7ba"


def test_a_missing_yaml_is_named():
    with pytest.raises(
        FileNotFoundError,
        match=r"--yaml: got absent\.yaml.*give one like those in .*yamls",
    ):
        load_template(Path("absent.yaml"), Path("runs/x"))
