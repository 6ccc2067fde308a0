from pathlib import Path

import pytest

from apex_composer.tools.training_yaml import (
    check_names,
    lay_out_stages,
    load_configuration,
    stream_folders,
)
from apex_composer.trainer.stages import parse_stages

YAML = Path(__file__).parents[2] / "yamls" / "tinyllama_apex.yaml"


def test_overrides_and_references_are_resolved():
    config = load_configuration(YAML, ["variables.stages=[2ba,3ba]", "algorithms.apex.seed=3"])
    assert config["algorithms"]["apex"]["stages"] == ["2ba", "3ba"] == config["scheduler"]["stages"]
    assert config["algorithms"]["apex"]["seed"] == 3
    assert list(check_names(config)) == []


def test_the_list_form_of_algorithms_is_understood(tmp_path):
    (tmp_path / "a.yaml").write_text("algorithms: [apex]\n")
    assert load_configuration(tmp_path / "a.yaml") == {"algorithms": {"apex": {}}}


@pytest.mark.parametrize("text", ["a: ${b}\n", "a: [\n", "a: ???\n"])
def test_a_broken_yaml_is_refused_by_name(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"a\.yaml: "):
        load_configuration(tmp_path / "a.yaml")
    with pytest.raises(FileNotFoundError, match=r"b\.yaml does not exist"):
        load_configuration(tmp_path / "b.yaml")


def test_what_llmfoundry_does_not_know_is_named_with_the_nearest_name():
    config = load_configuration(YAML)
    config["optimiser"] = config.pop("optimizer")
    config["callbacks"]["heart_beat"] = {}
    config["scheduler"]["name"] = "stage_wise"
    found = "\n".join(check_names(config))
    assert "optimizer: missing" in found
    assert "unknown key 'optimiser'. Did you mean 'optimizer'?" in found
    assert "callbacks: got 'heart_beat'" in found and "Did you mean 'heartbeat'?" in found
    assert "scheduler.name: got 'stage_wise'" in found and "'stagewise'" in found


def test_stages_in_epochs_are_left_to_the_run():
    assert lay_out_stages(parse_stages(3), "9ba").ends == (3, 6, 9)
    assert lay_out_stages(parse_stages(["1ep"]), "9ba") is None
    assert lay_out_stages(parse_stages(3), "2ep") is None


def test_folders_of_streams():
    streams = {"a": {"local": "/x/a", "remote": None}, "b": {"remote": "s3://b", "local": "/x/b"}}
    config = {"train_loader": {"dataset": {"streams": streams, "split": "train"}}}
    assert stream_folders(config) == [
        ("a", None, Path("/x/a/train")),
        ("b", "s3://b", Path("/x/b/train")),
    ]
    plain = {"train_loader": {"dataset": {"local": "/x"}}}
    assert stream_folders(plain) == [("data", None, Path("/x"))]
