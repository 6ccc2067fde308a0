import pytest
from llmfoundry.command_utils import train_from_yaml
from omegaconf import OmegaConf
from typer.testing import CliRunner

from apex_composer.cli import app
from apex_composer.tools.training_yaml import load_configuration
from apex_composer.tools.yaml_defaults import read_yaml

FILES = {
    "run.yaml": "defaults: [common/model.yaml, method.yaml]\nrun_name: own\n",
    "common/model.yaml": "defaults: [all.yaml]\nvariables: {lr: 2}\nrun_name: model\n",
    "common/all.yaml": (
        "optimizer: {name: adam, lr: '${variables.lr}'}\nvariables: {lr: 1, data: x}\n"
    ),
    "method.yaml": "variables: {lr: 3}\nstages: [1ep]\nalgorithms: [apex]\n",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run's YAML with its defaults, in the current folder."""
    (tmp_path / "common").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_later_files_win_and_references_lead_to_what_is_merged_last(folder):
    config = load_configuration(folder / "run.yaml")
    assert config == {
        "optimizer": {"name": "adam", "lr": 3},
        "variables": {"lr": 3, "data": "x"},
        "run_name": "own",
        "stages": ["1ep"],
        "algorithms": {"apex": {}},
    }


def test_the_command_line_comes_last(folder):
    config = load_configuration(folder / "run.yaml", ["variables.lr=4", "run_name=given"])
    assert (config["optimizer"]["lr"], config["run_name"]) == (4, "given")


def test_a_file_may_be_named_by_two_others(folder):
    (folder / "method.yaml").write_text("defaults: [common/all.yaml]\nvariables: {lr: 5}\n")
    assert load_configuration(folder / "run.yaml")["optimizer"]["lr"] == 5


@pytest.mark.parametrize(
    ("own", "change"),
    [("algorithms:\n  gmt: null\n", []), ("stages: 1\n", ["algorithms={gmt: null}"])],
)
def test_a_list_and_a_mapping_are_not_merged(folder, own, change):
    (folder / "run.yaml").write_text(f"defaults: [method.yaml]\n{own}")
    source = "command line" if change else r".*run\.yaml"
    with pytest.raises(ValueError, match=f"^{source}: algorithms: a list and a mapping"):
        read_yaml(folder / "run.yaml", change)


def test_null_does_not_remove(folder):
    (folder / "method.yaml").write_text("algorithms: {apex: {stages: 2}}\n")
    (folder / "run.yaml").write_text("defaults: [method.yaml]\nalgorithms: {apex: null}\n")
    assert load_configuration(folder / "run.yaml")["algorithms"] == {"apex": {}}


def test_a_circle_is_refused_with_the_files_that_make_it(folder):
    (folder / "common/all.yaml").write_text("defaults: [../run.yaml]\n")
    chain = "run.yaml -> .*/common/model.yaml -> .*/common/all.yaml -> .*/run.yaml leads back"
    with pytest.raises(ValueError, match=chain):
        read_yaml(folder / "run.yaml")


def test_a_missing_file_is_refused_with_the_files_that_lead_to_it(folder):
    (folder / "common/all.yaml").unlink()
    chain = r"all.yaml does not exist \(defaults: .*run.yaml -> .*model.yaml -> .*all.yaml\)"
    with pytest.raises(FileNotFoundError, match=chain):
        read_yaml(folder / "run.yaml")


@pytest.mark.parametrize("given", ["common/all.yaml", "null", "[1]", "{a: b.yaml}", "[[a.yaml]]"])
def test_anything_but_a_list_of_files_is_refused(folder, given):
    (folder / "run.yaml").write_text(f"defaults: {given}\n")
    with pytest.raises(ValueError, match="defaults: got .*needed: a list of YAML files"):
        read_yaml(folder / "run.yaml")


@pytest.mark.parametrize("text", [b"- a\n", b"1\n", b"a: [\n", b"\xff\xfe\x00"])
def test_a_file_that_holds_no_settings_is_refused_by_name(folder, text):
    (folder / "method.yaml").write_bytes(text)
    with pytest.raises(ValueError, match=r"method\.yaml"):
        read_yaml(folder / "run.yaml")


def test_the_environment_changes_no_setting(folder):
    (folder / "run.yaml").write_text("run_name: ${oc.env:HOME}\n")
    with pytest.raises(ValueError, match="oc.env"):
        load_configuration(folder / "run.yaml")


def test_show_prints_a_yaml_that_is_complete_without_its_defaults(folder):
    result = CliRunner().invoke(app, ["show", "run.yaml", "variables.data=y"])
    assert result.exit_code == 0, result.output
    (folder / "complete.yaml").write_text(result.stdout)
    plain = OmegaConf.load(folder / "complete.yaml")
    assert plain.optimizer == {"name": "adam", "lr": 3}
    assert load_configuration(folder / "complete.yaml", ["variables.data=x"]) == load_configuration(
        folder / "run.yaml"
    )
    # References are still there: the complete YAML takes the same changes.
    assert load_configuration(folder / "complete.yaml", ["variables.lr=6"])["optimizer"]["lr"] == 6


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["none.yaml"], "error: none.yaml does not exist"),
        (["a.pt", "max_duration=3ba"], "error: max_duration=3ba: changes are for a YAML"),
    ],
)
def test_show_refuses(folder, arguments, told):
    result = CliRunner().invoke(app, ["show", *arguments])
    assert result.exit_code == 1 and told in result.output


def test_llm_foundry_alone_refuses_defaults_and_says_what_to_do(folder):
    with pytest.raises(ValueError, match="defaults: got .*apex-composer's train.py"):
        train_from_yaml(str(folder / "run.yaml"))
