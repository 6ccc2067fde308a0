"""The command from its arguments to its files: parts, resuming, several models, what it refuses."""

import csv
import json
from pathlib import Path
from statistics import fmean

import pytest
import torch
from composer import Trainer
from corpus import sentences, write_jsonl
from helpers import TokenDataset
from saved_runs import base_folder, load, noisy, save, tokenizer_of, wrapped
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from apex_composer import APEX
from apex_composer.callbacks.local_metrics import LocalMetrics
from apex_composer.cli import app
from apex_composer.observe import observation
from apex_composer.report.read_run import read_runs

TEXTS = [sentences(seed, 12) for seed in range(6)]
LENGTH = ("--sequence-length", "32", "--threshold", "0.25")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = base_folder(tmp_path_factory.mktemp("base") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "some.jsonl", TEXTS)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("pairs") / "some.jsonl"
    lines = [{"prompt": text, "response": " and so on"} for text in TEXTS]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def run(*arguments, status: int = 0):
    result = CliRunner().invoke(app, ["observe", *map(str, arguments), "--device", "cpu"])
    assert result.exit_code == status, result.output
    return result


def results(folder: Path) -> dict:
    return json.loads((folder / "observe.json").read_text())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_all_of_a_model(base, pairs, tmp_path):
    out = tmp_path / "out"
    options = ("--mask", 0.25, "--mask", 0.5, "--plots", "png", *LENGTH)
    told = run(base, "--data", pairs, "--out", out, *options).output
    found = results(out)
    assert found["model"] == str(base) and found["data"]["samples"] == {"some": len(TEXTS)}
    assert found["activations"]["samples"] == len(TEXTS)
    groups = found["activations"]["groups"]
    units = rows(out / "activations.csv")
    assert len(units) == sum(len(group["score"]) for group in groups.values())
    first = groups[units[0]["group"]]
    assert float(units[0]["mean_norm"]) == first["mean_norm"][0]
    assert {row["group"]: float(row[str(base)]) for row in rows(out / "deviations.csv")} == {
        name: group["std"] for name, group in groups.items()
    }
    table = found["masking"]
    assert [(row["which"], row["share"]) for row in table] == [
        ("none", 0.0),
        *((which, share) for share in (0.25, 0.5) for which in ("lowest", "top", "random")),
    ]
    assert all(0 <= row["exact_match"] <= 1 for row in table)
    assert [row["which"] for row in rows(out / "masking.csv")] == [row["which"] for row in table]
    assert "exact" in told and "top 0.25" in told and "…" not in told
    for name in ("deviations", "heads", "channels", "masking"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"{name}.png" in told.replace("\n", "")


def test_an_interrupted_run_goes_on(base, data, tmp_path, monkeypatch):
    arguments = (base, "--data", data, "--mask", 0.25, *LENGTH)
    run(*arguments, "--out", tmp_path / "whole")
    calls = []

    def interrupted(*given, **options):
        calls.append(options["title"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measured(*given, **options)

    measured, out = observation.measure_masked, tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(observation, "measure_masked", interrupted)
        run(*arguments, "--out", out, status=130)
        assert [row["which"] for row in results(out)["masking"]] == ["none", "lowest"]
        assert results(out)["unfinished"]
        patch.setattr(observation, "collect_totals", None)  # it is not called again
        run(*arguments, "--out", out)
        assert calls == ["lowest 0.25", "top 0.25", "top 0.25", "random 0.25"]
        assert results(out) == results(tmp_path / "whole")
        patch.setattr(observation, "predict", None)
        run(*arguments, "--out", out)
    assert results(out) == results(tmp_path / "whole")


def test_results_of_something_else_are_not_gone_on_with(base, data, tmp_path):
    run(base, "--data", data, "--out", tmp_path, *LENGTH)
    before = results(tmp_path)
    other = base_folder(tmp_path / "other")
    noisy(model := load(base), 1).save_pretrained(other)
    for arguments, differs in (
        ((base, "--threshold", 0.5), "settings.threshold is 0.25 there, 0.5 here"),
        ((base, "--samples", 2), "data.samples.some is"),
        ((other,), "model_sha256 is"),
    ):
        given = (*arguments[:1], "--data", data, "--out", tmp_path, *LENGTH, *arguments[1:])
        told = run(*given, status=1).output
        assert "of something else" in told and differs in told and "--overwrite" in told
        assert results(tmp_path) == before
    run(other, "--data", data, "--out", tmp_path, *LENGTH, "--overwrite")
    assert results(tmp_path)["model_sha256"] != before["model_sha256"]
    assert model is not None


def test_models_side_by_side(base, data, tmp_path):
    trained = save(wrapped(noisy(load(base), 1), tokenizer_of(base)), tmp_path / "trained.pt")
    told = run(base, trained, "--data", data, "--out", tmp_path / "out", *LENGTH).output
    table = rows(tmp_path / "out" / "side_by_side.csv")
    for name, place in (("model", base), ("trained", trained)):
        found = results(tmp_path / "out" / name)
        assert found["model"] == str(place)
        deviations = [group["std"] for group in found["activations"]["groups"].values()]
        assert [float(row[name]) for row in table] == deviations
        assert name in told
    assert [row["model"] for row in table] != [row["trained"] for row in table]


def test_ranks_and_changes_of_weights(base, data, tmp_path, monkeypatch):
    trained = tmp_path / "trained"
    base_folder(trained)
    noisy(load(base), 1).save_pretrained(trained)
    out = tmp_path / "out"
    arguments = (trained, "--data", data, "--out", out, *LENGTH, "--ranks", "--delta", base)
    run(*arguments)
    found = results(out)
    ranks, delta = found["ranks"]["weights"], found["delta"]["weights"]
    assert found["delta"]["base"] == str(base) and set(ranks) <= set(delta)
    heads = [one for name, one in ranks.items() if "o_proj" in name]
    assert heads and all(one["advantageous_rank"] > 0 for one in heads)
    assert all(delta[name]["relative_change"] > 0 for name in ranks)
    assert {row["weight"] for row in rows(out / "ranks.csv")} == set(ranks)
    monkeypatch.setattr(observation, "collect_totals", None)
    run(*arguments)  # nothing is left to do
    assert results(out) == found


def trained_with_apex(base: Path, folder: Path) -> list[Path]:
    """Checkpoints at the ends of the two stages of a run, whose metrics lie beside them."""
    model = wrapped(load(base), tokenizer_of(base))
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(TokenDataset(16), batch_size=4),
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-2),
        max_duration="4ba",
        algorithms=[APEX(threshold=0.25, stages=2)],
        loggers=[LocalMetrics(folder=str(folder / "metrics"))],
        run_name="run",
        save_folder=str(folder / "checkpoints"),
        save_interval="2ba",
        device="cpu",
        seed=17,
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return [folder / "checkpoints" / f"ep0-ba{batch}-rank0.pt" for batch in (2, 4)]


def test_the_stages_of_a_run_against_its_base_and_in_a_report(base, tmp_path):
    stages = trained_with_apex(base, tmp_path / "run")
    out = tmp_path / "run" / "observe"
    given = (base, *stages, "--ranks", "--delta", base, "--threshold", 0.25, "--out", out)
    told = run(*given).output
    names = ["model", "ep0-ba2-rank0", "ep0-ba4-rank0"]
    found = [results(out / name) for name in names]
    assert [one["place"] for one in found] == [1, 2, 3]
    # At its end a stage has the next one's selection too, by which nothing was trained yet.
    assert [one["ranks"]["selected"] for one in found] == [
        {},
        {"by": "checkpoint", "stage": 0},
        {"by": "checkpoint", "stage": 1},
    ]
    for place, one in enumerate(found):
        for name, entry in one["ranks"]["weights"].items():
            assert (entry["row_space_overlap"] is None) == (place == 0), name
            change = one["delta"]["weights"][name]
            sides = [change[f"{side}_change"] for side in ("advantageous", "unselected")]
            assert all(value > 0 for value in sides) if place else sides == [None, None]
    table = rows(out / "ranks_side_by_side.csv")
    by_weight = found[2]["ranks"]["weights"]
    assert {row["weight"]: float(row[f"entropy_rank {names[2]}"]) for row in table} == {
        name: entry["entropy_rank"] for name, entry in by_weight.items()
    }
    assert "effective rank" in told
    (read,) = read_runs([tmp_path / "run"])
    assert list(read.observations) == [f"observe/{name}" for name in names]  # as they were given
    assert not any("observation" in line for line in read.missing)
    page = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--out", str(page)])
    assert result.exit_code == 0, result.output
    shown = page.read_text()
    weights = [list(one["ranks"]["weights"].values()) for one in found]
    means = [
        fmean(e["entropy_rank"] for e in own if e["projection"] == "q_proj") for own in weights
    ]
    cells = "".join(f'<td class="n">{mean:.2f}</td>' for mean in means)
    assert f'<th scope="row">q_proj</th>{cells}' in shown


def test_weights_alone_need_no_texts(base, tmp_path):
    run(base, "--out", tmp_path, "--ranks", "--threshold", "0.25")
    found = results(tmp_path)
    assert "activations" not in found and found["data"] is None
    assert all(one["advantageous_rank"] is None for one in found["ranks"]["weights"].values())


def test_the_papers_protocol(base, tmp_path):
    few = write_jsonl(tmp_path / "few.jsonl", TEXTS)
    out = tmp_path / "out"
    options = ("--out", out, "--protocol", "paper", "--sequence-length", "8")
    told = run(base, "--data", few, *options, status=1).output
    assert "has 6 samples, and it needs 2048" in " ".join(told.split())
    many = write_jsonl(tmp_path / "many.jsonl", [f"{number} words here" for number in range(2100)])
    run(base, "--data", many, *options, "--threshold", "0.25", "--batch-size", "512")
    found = results(out)
    assert found["activations"]["protocol"] == "paper"
    assert found["activations"]["samples"] == 2048


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "nothing to observe: give --data, --ranks or --delta"),
        (("--data", "none"), "--data: none does not exist"),
        (("--ranks", "--mask", "0.1"), "--mask needs --data"),
        (("--data", "DATA", "--mask", "10"), "--mask: got 10.0, allowed: a share above 0, to 1"),
        (("--data", "DATA", "--threshold", "0.6"), "--threshold: got 0.6, allowed: above 0"),
        (("--data", "DATA", "--protocol", "paper", "--samples", "9"), "--samples: got 9"),
        (("--data", "BASE"), "no"),
        (("BASE", "--ranks"), "names one of them twice"),
        (("--ranks", "--delta", "none"), "--delta: none does not exist"),
    ],
)
def test_bad_input_is_told_before_a_model_is_loaded(
    base, data, tmp_path, monkeypatch, arguments, told
):
    monkeypatch.setattr(observation, "open_model", None)
    monkeypatch.chdir(tmp_path)
    places = {"DATA": data, "BASE": base}
    given = [places.get(argument, argument) for argument in arguments]
    output = " ".join(run(base, "--out", "out", *given, status=1).output.split())
    assert output.startswith("error: ") and told in output
    assert not (tmp_path / "out").exists()


def test_sequences_beyond_the_positions_are_refused(base, data, tmp_path):
    length = ("--sequence-length", 33)
    told = run(base, "--out", tmp_path / "out", "--data", data, *length, status=1).output
    assert "--sequence-length 33 is more than the 32 positions" in " ".join(told.split())
    assert not (tmp_path / "out" / "observe.json").exists()
