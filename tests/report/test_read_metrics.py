from pathlib import Path

import pytest

from apex_composer.callbacks.metrics_file import LOSS, NAME, encode
from apex_composer.report.read_metrics import flatten
from apex_composer.report.read_run import read_runs


def lines_from(batch: int, count: int = 2, **config: object) -> list[dict]:
    """A process that goes on at a batch."""
    clock = {"tokens": 64 * batch, "samples": 0, "seconds": 0.0}
    own = {"run_name": "r", "versions": {}, "device": config.pop("device", "cpu")}
    lines: list[dict] = [{"kind": "start", "batch": batch, **clock, **own}]
    if config:
        settings = {"model": {"name": "m"}} | config
        lines.append({"kind": "settings", "batch": batch, **clock, "settings": settings})
    for trained in range(batch + 1, batch + 1 + count):
        logged = {"took": 0.5, "trained": 64, "during": {LOSS: 3.0}, "metrics": {}}
        lines.append({"kind": "batch", "batch": trained, **clock, **logged})
    return lines


def put(folder: Path, *lines: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).write_bytes(b"".join(map(encode, lines)))


def test_settings_are_those_of_the_last_process_and_changes_are_named(tmp_path):
    first = lines_from(0, max_duration="2ba", load_path="base.pt", lr=1, seed=3, save_folder="a")
    second = lines_from(2, max_duration="4ba", load_path="own.pt", seed=3, save_folder="b")
    put(tmp_path, *first, *second, *lines_from(4, device="gpu"))
    (run,) = read_runs([tmp_path])
    assert run.settings["max_duration"] == "4ba" and run.settings["load_path"] == "base.pt"
    assert "lr" not in run.settings and run.device == "cpu, then gpu"
    assert [line for line in run.missing if line.startswith("settings")] == [
        "settings until batch 2: lr was 1",
        "settings until batch 2: max_duration was 2ba",
    ]


def test_what_is_no_setting_and_no_duration_is_left_out(tmp_path):
    """Hyper-parameters that algorithms log; and the clock was set back during a batch."""
    lines = lines_from(0, 3, lr=1)
    lines[1]["settings"] |= {"apex/trained": "2.4 %", "enabled_algorithms/APEX": True}
    lines[3]["took"] = -3599.5
    put(tmp_path, *lines)
    (run,) = read_runs([tmp_path])
    assert run.settings == {"model.name": "m", "lr": 1} and run.step_seconds == [0.5, 0.5]


def test_a_run_from_another_ones_checkpoint_says_what_it_lacks(tmp_path):
    put(tmp_path, *lines_from(40, lr=1))
    (run,) = read_runs([tmp_path])
    assert run.loss.batches == [40, 41]
    assert any(line.startswith("batches before 40: the run went on") for line in run.missing)


def test_two_runs_at_once_in_one_folder_are_refused(tmp_path):
    one, other = lines_from(0, 4), lines_from(0, 4)
    mixed = [one[0], one[1], other[0], other[1], one[2], other[2]]
    put(tmp_path, *mixed)
    with pytest.raises(ValueError, match="two runs have written to it at the same time"):
        read_runs([tmp_path])


def test_evaluators_of_any_label_are_validation_and_training_is_none(tmp_path):
    losses = {f"metrics/{d}/LanguageCrossEntropy": 2.0 for d in ("cc", "eval", "eval/x", "train")}
    clock = {"kind": "evaluation", "batch": 2, "tokens": 128}
    put(tmp_path, *lines_from(0), {**clock, "metrics": losses, "predicted": {"cc": 3}})
    (run,) = read_runs([tmp_path])
    assert run.validation.keys() == {"cc", "eval", "x"}


def test_versions_and_validation_texts_of_a_run_in_parts_are_those_of_all_parts(tmp_path):
    first, second = lines_from(0), lines_from(2)
    first[0]["versions"], second[0]["versions"] = {"torch": "2.8.0"}, {"torch": "2.7.0"}
    losses = {"metrics/eval/cc/LanguageCrossEntropy": 2.0}
    clock = {"kind": "evaluation", "metrics": losses}
    early = {**clock, "batch": 2, "tokens": 128, "predicted": {"eval/cc": 1000}}
    late = {**clock, "batch": 4, "tokens": 256, "predicted": {"eval/cc": 2500}}
    put(tmp_path, *first, early, *second, late)
    (run,) = read_runs([tmp_path])
    assert run.versions == {"torch": "2.8.0, then 2.7.0"}
    assert run.validation_tokens == {"cc": 2500}
    assert "one validation text: cc had 1,000 predicted tokens until batch 2" in run.missing


def test_settings_become_flat():
    nested = {"a": {"b": 1, "c": {}}, "eval_loader": [{"label": "cc", "d": 2}], "betas": [0.9]}
    assert flatten(nested) == {"a.b": 1, "a.c": {}, "betas": [0.9]} | {
        "eval_loader.cc.label": "cc",
        "eval_loader.cc.d": 2,
    }
