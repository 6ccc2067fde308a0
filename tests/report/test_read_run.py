import json
from pathlib import Path

import numpy
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_composer.callbacks.metrics_file import LOSS, NAME, encode
from apex_composer.report.answers import answer
from apex_composer.report.read_run import read_runs

GROUPS = ("model.layers.0.self_attn.heads", "model.layers.0.mlp.channels")
RECORD = {
    "stage": 0,
    "expansion": True,
    "samples": 8,
    "advantageous": {GROUPS[0]: [1], GROUPS[1]: [2, 3]},
    "disadvantageous": {GROUPS[0]: [0], GROUPS[1]: [0, 1]},
    "overlap": {},
    "norm_std": {GROUPS[0]: 0.5, GROUPS[1]: 0.25},
    "start_batch": 0,
}


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def logged(folder: Path, run_name: str, seed: int = 17, settings: bool = True) -> None:
    """What `local_metrics` writes: two batches and an evaluation of two domains."""
    clock = {"tokens": 0, "samples": 0, "seconds": 0.0}
    lines = [
        {"kind": "start", "batch": 0, "run_name": run_name, "versions": {"torch": "2.7.0"}}
        | {"device": "cpu, 2 threads"}
    ]
    if settings:
        config = {"model": {"name": "hf_causal_lm"}, "seed": seed, "run_name": run_name}
        lines.append({"kind": "settings", "batch": 0, "settings": config})
        lines.append({"kind": "settings", "batch": 0, "settings": {"num_nodes": 1}})
    for batch in (1, 2):
        own = {"tokens": 64 * batch, "took": 0.5, "trained": 64}
        during, metrics = {LOSS: 3.0 - batch}, {"apex/stage": 0}
        lines.append(
            {"kind": "batch", "batch": batch, **clock, **own, "during": during, "metrics": metrics}
        )
    losses = {f"metrics/eval/{d}/LanguageCrossEntropy": v for d, v in (("cc", 2.0), ("c4", 1.0))}
    predicted = {"eval/cc": 30, "eval/c4": 10}
    lines.append(
        {"kind": "evaluation", "batch": 2, **clock, "tokens": 128, "metrics": losses}
        | {"predicted": predicted}
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).write_bytes(b"".join(map(encode, lines)))


@pytest.mark.parametrize("given", ["", "metrics", f"metrics/{NAME}", ".."])
def test_a_run_is_found_by_any_of_its_places(tmp_path, given):
    logged(tmp_path / "job" / "apex" / "metrics", "apex")
    (run,) = read_runs([tmp_path / "job" / "apex" / given])
    assert run.folder.resolve() == tmp_path / "job" / "apex" and run.name == "apex"
    assert run.settings == {"model.name": "hf_causal_lm", "seed": 17, "run_name": "apex"}
    assert (run.loss.batches, run.loss.tokens, run.loss.values) == ([0, 1], [0, 64], [2.0, 1.0])
    assert run.validation["cc"].tokens == [128] and run.validation_tokens == {"cc": 30, "c4": 10}
    assert run.step_seconds == [0.5, 0.5] and run.metrics.keys() == {"apex/stage"}
    assert answer([run]).finals["apex"]["total"].loss.mean == 1.75


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for seed in (17, 18):
        logged(tmp_path / "runs" / "full" / f"seed{seed}" / "metrics", "full", seed)
    runs = read_runs([tmp_path, tmp_path / "runs"])
    assert [run.name for run in runs] == ["full/seed17", "full/seed18"]
    (group,) = answer(runs).groups
    assert group.name == "full" and group.seeds == (17, 18)


def test_stages_come_with_their_scores_and_what_lacks_is_named(tmp_path):
    logged(tmp_path, "apex")
    content = json.dumps({**RECORD, "units": dict(zip(GROUPS, ("head", "channel"), strict=True))})
    for stage, scores in enumerate(({f"scores/{GROUPS[0]}": numpy.array([-1, 1])}, {})):
        record = json.loads(content) | {"stage": stage, "method": "rank"}
        numpy.savez(tmp_path / f"s{stage}.npz", record=numpy.array(json.dumps(record)), **scores)
    (tmp_path / "s2.npz").write_text("not one")
    with (tmp_path / NAME).open("ab") as file:
        for stage in range(4):
            file.write(
                encode(
                    {"kind": "stage", "batch": 2, "tokens": 0, "stage": stage}
                    | {"file": f"s{stage}.npz"}
                )
            )
    (run,) = read_runs([tmp_path])
    assert [stage.number for stage in run.stages] == [0, 1]
    assert run.stages[0].scores == {GROUPS[0]: [-1, 1]} and run.stages[1].scores is None
    assert run.stages[0].units == {GROUPS[0]: "head", GROUPS[1]: "channel"}
    named = " ".join(run.missing)
    assert "scores of stage 1" in named
    assert "stage 2: " in named and "s2.npz cannot be read" in named and "stage 3: " in named


def test_damage_and_losses_are_named(tmp_path):
    logged(tmp_path, "apex", settings=False)
    with (tmp_path / NAME).open("ab") as file:
        file.write(
            b"\0\0\n" + encode({"kind": "lost", "batch": 9, "first": 3, "lines": 7} | {"tokens": 0})
        )
    (run,) = read_runs([tmp_path])
    assert "1 lines of metrics.jsonl are damaged and left out" in run.missing
    assert "7 batches from 3 to 9: the disk was full or could not be written to" in run.missing
    assert any("log_config: true" in line for line in run.missing)
    (tmp_path / "config.yaml").write_text("model: {name: hf_causal_lm}\nseed: 3\n")
    (run,) = read_runs([tmp_path])
    assert run.settings["seed"] == 3 and not any("log_config" in line for line in run.missing)


def test_foreign_and_missing_files_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run.*local_metrics"):
        read_runs([tmp_path / "nothing"])
    write(tmp_path / "a" / NAME, "{}\n")
    with pytest.raises(ValueError, match="a/metrics.jsonl is no file of the logger local_metrics"):
        read_runs([tmp_path / "a"])
    write(tmp_path / "b" / "metrics.json", {"accuracy": 1})
    with pytest.raises(ValueError, match="b/metrics.json is not of a run of this project"):
        read_runs([tmp_path / "b"])
    write(tmp_path / "c" / "result.json", "{")
    with pytest.raises(ValueError, match="c/result.json is damaged"):
        read_runs([tmp_path / "c"])


def test_observations_are_those_in_the_folder(tmp_path):
    logged(tmp_path / "metrics", "apex")
    write(tmp_path / "observe.json", {"model": "m"})
    write(tmp_path / "observe-base.json", {"model": "base"})
    (run,) = read_runs([tmp_path])
    assert run.observations["observe-base.json"] == {"model": "base"} and len(run.observations) == 2


def test_observations_of_several_models_keep_their_order_and_interrupted_ones_are_told(tmp_path):
    logged(tmp_path / "metrics", "apex")
    for place, name in ((1, "base"), (2, "ba20"), (3, "ba9")):
        write(tmp_path / "observe" / name / "observe.json", {"place": place})
    write(tmp_path / "torn" / "observe.json", {"unfinished": True})
    (run,) = read_runs([tmp_path])
    assert list(run.observations) == ["observe/base", "observe/ba20", "observe/ba9"]
    assert any(line.startswith("torn: the observation was interrupted") for line in run.missing)


def demo(folder: Path) -> None:
    """What `make train` has left before it logged locally."""
    config = {"seed": 17, "max_seq_len": 16, "global_train_batch_size": 4}
    for name in ("base", "vanilla", "apex"):
        found = {"loss": [3.0, 2.0], "step_seconds": [0.1, 0.2], "cross_entropy": {"a": 2.0}}
        found |= {"stages": [RECORD] if name == "apex" else [], "device": "cpu", "threads": 2}
        found |= {"operator_norms": {"q_proj": [[1, 0.5]]} if name == "apex" else {}}
        write(folder / name / "metrics.json", found)
        own = config | {"run_name": name, "train_loader": {"name": "text"}}
        own |= {"algorithms": {"apex": {"stages": 1}}} if name == "apex" else {}
        write(folder / name / "config.yaml", yaml.safe_dump(own))
    data = {"predicted_validation_tokens": {"a": 150}}
    write(folder / "summary.json", {"versions": {"torch": "2.7.0"}, "data": data})


def test_what_make_train_left_before_is_read_as_far_as_it_goes(tmp_path):
    demo(tmp_path / "demo")
    write(tmp_path / "demo" / "compare" / "runs" / "full" / "seed17" / "result.json", {})
    runs = {run.name: run for run in read_runs([tmp_path / "demo"])}
    assert runs.keys() == {"base", "vanilla", "apex"}
    apex = runs["apex"]
    assert apex.loss.tokens == [0, 64] and apex.validation["a"].tokens == [128]
    assert apex.stages[0].units == {GROUPS[0]: "head", GROUPS[1]: "channel"}
    assert apex.metrics["apex/operator_norm/q_proj"].tokens == [64]
    assert apex.validation_tokens == {"a": 150} and apex.device == "cpu, 2 threads"
    assert any("scores" in line and "run it again" in line for line in apex.missing)
    assert answer(list(runs.values())).baselines[0] in ("base", "vanilla")


def test_what_make_compare_left_before_is_read_as_far_as_it_goes(tmp_path):
    folder = tmp_path / "demo" / "compare"
    result = {"training_loss": [3.0], "step_seconds": [0.1], "held_out_loss": 2.0, "device": "cpu"}
    for seed in (17, 18):
        own = folder / "runs" / "full" / f"seed{seed}"
        write(own / "result.json", result)
        config = {"run_name": "full", "seed": seed, "train_loader": {"name": "finetuning"}}
        write(own / "config.yaml", yaml.safe_dump(config))
    write(folder / "inputs.json", {"versions": {"torch": "2.7.0"}, "instructions": {"kind": "x"}})
    runs = read_runs([folder])
    assert [run.name for run in runs] == ["full/seed17", "full/seed18"]
    assert runs[0].validation["held_out"].values == [2.0] and runs[0].loss.tokens == []
    assert runs[0].versions == {"torch": "2.7.0"} and runs[0].data == {"kind": "x"}
    assert any(line.startswith("training tokens") for line in runs[0].missing)
    found = answer(runs)
    assert found.finals["full"]["held_out"].loss.mean == 2.0 and not found.reaches


def test_the_manifest_of_the_training_data_is_found_beside_it(tmp_path):
    logged(tmp_path / "run", "apex", settings=False)
    (run,) = read_runs([tmp_path / "run"])
    assert run.data == {} and any(line.startswith("data: no manifest") for line in run.missing)
    write(tmp_path / "data" / "manifest.json", {"splits": {"train": {"cc": {"tokens": 9}}}})
    local = str(tmp_path / "data" / "train" / "cc")
    streams = {"cc": {"local": local}}
    config = {"model": {"name": "m"}, "train_loader": {"dataset": {"streams": streams}}}
    write(tmp_path / "run" / "config.yaml", yaml.safe_dump(config))
    (run,) = read_runs([tmp_path / "run"])
    assert run.data["splits"] == {"train": {"cc": {"tokens": 9}}} and len(run.data["sha256"]) == 64


def test_a_folder_by_two_paths_is_one_run(tmp_path, monkeypatch):
    logged(tmp_path / "a", "a")
    monkeypatch.chdir(tmp_path)
    assert len(read_runs([Path("a"), tmp_path / "a", Path("a") / ".." / "a"])) == 1


def test_algorithms_in_a_list_are_read_as_the_trainer_reads_them(tmp_path):
    logged(tmp_path, "a", settings=False)
    config = {"model": {"name": "m"}, "algorithms": ["relora", {"apex": {"threshold": 0.25}}]}
    write(tmp_path / "config.yaml", yaml.safe_dump(config))
    (run,) = read_runs([tmp_path])
    assert run.settings["algorithms.apex.threshold"] == 0.25 and "algorithms.relora" in run.settings


@settings(max_examples=150)
@given(place=st.floats(0, 1), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_byte_gives_a_run_or_a_reason(tmp_path_factory, place, byte, cut):
    """In the numbers of a run, of an older job, or of a stage."""
    folder = tmp_path_factory.mktemp("damaged")
    logged(folder / "new", "new")
    content = numpy.array(json.dumps({**RECORD, "method": "rank"}))
    scores = {f"scores/{GROUPS[0]}": numpy.array([-1, 1])}
    numpy.savez_compressed(folder / "new" / "s.npz", record=content, **scores)
    with (folder / "new" / NAME).open("ab") as file:
        file.write(encode({"kind": "stage", "batch": 2, "tokens": 0, "stage": 0, "file": "s.npz"}))
    demo(folder / "old")
    for path in (*folder.rglob("*.json*"), folder / "new" / "s.npz"):
        whole = path.read_bytes()
        at = int(place * (len(whole) - 1))
        path.write_bytes(whole[:at] + (b"" if cut else bytes([byte]) + whole[at + 1 :]))
    for own in ("new", "old/base", "old/apex"):
        try:
            read_runs([folder / own])
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error)
