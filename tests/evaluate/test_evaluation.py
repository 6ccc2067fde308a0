import json
import os
import socket
from contextlib import contextmanager
from dataclasses import replace

import numpy
import pytest
import torch
from lm_eval.models.huggingface import HFLM

from apex_composer.evaluate import evaluation
from apex_composer.evaluate.evaluation import Evaluation, Settings, find_problems
from apex_composer.evaluate.harness import build_task, find_tasks
from apex_composer.evaluate.preset import PresetTask, read_preset


@contextmanager
def no_network():
    def refuse(*_, **__):
        raise AssertionError("a connection to a network was tried")

    patch = pytest.MonkeyPatch()
    for name in ("connect", "connect_ex", "sendto"):
        patch.setattr(socket.socket, name, refuse)
    patch.setattr(socket, "getaddrinfo", refuse)
    try:
        yield
    finally:
        patch.undo()


@pytest.fixture(scope="module")
def tasks(preset):
    return read_preset(str(preset)).tasks


@pytest.fixture(scope="module")
def settings(data_dir):
    return Settings(data_dir=data_dir, max_length=1100, run_code=True)


@pytest.fixture(scope="module")
def finished(tasks, settings, model_folder, open_model, short_answers, tmp_path_factory):
    """All tasks on the model, without a network: the file, and what was told."""
    path, told = tmp_path_factory.mktemp("out") / "eval.json", []
    with no_network():
        failed = Evaluation(tasks, settings, path, told.append).evaluate(
            str(model_folder), open_model
        )
    assert failed == []
    return path, told


def record_of(path, model_folder):
    return json.loads(path.read_text())["models"][str(model_folder)]


def test_every_task_is_done_and_named(finished, tasks, model_folder):
    path, told = finished
    record = record_of(path, model_folder)
    assert [*record["tasks"]] == [task.key for task in tasks] and record["problems"] == {}
    assert told[0] == f"{model_folder}: sciq-2 (1 of {len(tasks)})"
    documents = {key: result["documents"] for key, result in record["tasks"].items()}
    requests = {key: result["requests"] for key, result in record["tasks"].items()}
    assert documents == {"sciq-2": 16, "nq_open-1": 2, "tydiqa-1": 9, "humaneval_pass_at_10-0": 1}
    assert requests == {**documents, "sciq-2": 64, "humaneval_pass_at_10-0": 20}
    assert {*record["tasks"]["nq_open-1"]["metrics"]} == {"exact_match,remove_whitespace"}
    assert {*record["tasks"]["humaneval_pass_at_10-0"]["metrics"]} == {
        "pass@1,code",
        "pass@10,code",
    }
    # Every language counts the same.
    tydiqa = record["tasks"]["tydiqa-1"]
    parts = [part["f1,none"]["value"] for part in tydiqa["parts"].values()]
    assert (
        tydiqa["metrics"]["f1,none"]["value"] == pytest.approx(numpy.mean(parts))
        and len(parts) == 9
    )


def test_accuracy_is_that_of_the_models_own_probabilities(
    finished, tasks, settings, model_folder, open_model
):
    """acc: the likeliest answer is right; acc_norm: the likeliest by character."""
    manager = find_tasks(tasks)
    (task,) = build_task(manager, tasks[0], settings.data_dir).get_all_tasks()
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests()
    right = {"acc": [], "acc_norm": []}
    with open_model(model_folder) as opened:
        model = opened.model.double()
        for document_ in task.eval_docs:
            prompt = next(i.args[0] for i in task.instances if i.doc == document_)
            answers = [document_[f"distractor{i}"] for i in (1, 2, 3)] + [
                document_["correct_answer"]
            ]
            sums = []
            for answer in answers:
                ids = opened.tokenizer(f"{prompt} {answer}", return_tensors="pt").input_ids
                length = len(answer.split())
                with torch.no_grad():
                    logs = model(ids).logits[0, :-1].log_softmax(-1)
                chosen = logs.gather(1, ids[0, 1:, None])[-length:]
                sums.append(float(chosen.sum()))
            lengths = [len(answer) for answer in answers]
            right["acc"].append(numpy.argmax(sums) == 3)
            right["acc_norm"].append(numpy.argmax(numpy.divide(sums, lengths)) == 3)
    metrics = record_of(finished[0], model_folder)["tasks"]["sciq-2"]["metrics"]
    for name, values in right.items():
        assert 0 < numpy.mean(values) < 1
        error = numpy.std(values, ddof=1) / len(values) ** 0.5
        assert metrics[f"{name},none"]["value"] == numpy.mean(values)
        assert metrics[f"{name},none"]["stderr"] == pytest.approx(error)


def test_a_repeated_call_runs_nothing_again_and_keeps_other_models(
    finished, tasks, settings, model_folder, open_model, tmp_path, monkeypatch
):
    content = json.loads(finished[0].read_text())
    content["models"]["another"] = {"tasks": {}, "problems": {}}
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(content))
    monkeypatch.setattr(evaluation, "run_task", None)
    told = []
    assert (
        Evaluation(tasks, settings, path, told.append).evaluate(str(model_folder), open_model) == []
    )
    assert told[1::2] == ["  done by an earlier call"] * len(tasks)
    assert json.loads(path.read_text())["models"] == content["models"]


def test_the_same_numbers_come_again_and_only_of_the_same_data(
    finished, tasks, settings, model_folder, open_model, data_dir, tmp_path
):
    """Examples are drawn by a fixed seed; other data is another identity."""
    first = record_of(finished[0], model_folder)["tasks"]["sciq-2"]
    path = tmp_path / "eval.json"
    Evaluation(tasks[:1], settings, path, str).evaluate(str(model_folder), open_model)
    again = record_of(path, model_folder)["tasks"]["sciq-2"]
    assert again["metrics"] == first["metrics"] and again["identity"] == first["identity"]

    train = data_dir / "allenai/sciq/default/train.jsonl"
    before = train.read_bytes()
    try:
        train.write_bytes(before + before)
        other = Evaluation(tasks[:1], settings, path, str)
        other.evaluate(str(model_folder), open_model)
    finally:
        train.write_bytes(before)
    changed = record_of(path, model_folder)["tasks"]["sciq-2"]["identity"]
    assert changed.pop("data") != first["identity"]["data"]
    assert changed.items() <= first["identity"].items()


def test_data_of_the_same_time_of_change_are_read_anew(
    settings, model_folder, open_model, tmp_path
):
    """`datasets` knows a file by path and time, which archives and copies keep."""
    path = tmp_path / "EleutherAI/lambada_openai/default/test.jsonl"
    path.parent.mkdir(parents=True)
    tasks = [PresetTask("lambada_openai", "LAMBADA", 0, "acc", "lambada")]
    own = replace(settings, data_dir=tmp_path)
    numbers = []
    for last in ("w3", "w4"):
        path.write_text(json.dumps({"text": f"w1 w2 {last}"}) + "\n")
        os.utime(path, (1, 1))
        failed = Evaluation(tasks, own, tmp_path / "eval.json", str).evaluate(
            str(model_folder), open_model
        )
        assert failed == []
        result = record_of(tmp_path / "eval.json", model_folder)["tasks"]["lambada_openai-0"]
        numbers.append(result["metrics"]["perplexity,none"]["value"])
    with open_model(model_folder) as opened:
        ids = opened.tokenizer(["w1 w2 w3", "w1 w2 w4"], return_tensors="pt").input_ids
        with torch.no_grad():
            logs = opened.model(ids).logits[:, -2].log_softmax(-1)
    expected = (-logs.gather(1, ids[:, -1:])).exp().flatten().tolist()
    assert numbers == pytest.approx(expected, rel=1e-5) and numbers[0] != numbers[1]


def test_a_trial_is_another_identity_and_its_documents_are_the_first(
    finished, tasks, settings, model_folder, open_model, tmp_path
):
    path = tmp_path / "eval.json"
    path.write_bytes(finished[0].read_bytes())
    trial = replace(settings, limit=3)
    Evaluation(tasks[:1], trial, path, str).evaluate(str(model_folder), open_model)
    result = record_of(path, model_folder)["tasks"]["sciq-2"]
    assert result["documents"] == result["identity"]["limit"] == 3


def test_results_of_other_weights_under_the_same_name_go(
    finished, settings, model_folder, open_model, tmp_path
):
    @contextmanager
    def trained_on(source, **_):
        with open_model(model_folder) as opened:
            opened.model.lm_head.weight.data[0, 0] += 1
            yield opened

    path = tmp_path / "eval.json"
    path.write_bytes(finished[0].read_bytes())
    Evaluation([], settings, path, str).evaluate(str(model_folder), open_model)
    assert path.read_bytes() == finished[0].read_bytes()
    told = []
    Evaluation([], settings, path, told.append).evaluate(str(model_folder), trained_on)
    assert record_of(path, model_folder)["tasks"] == {}
    assert told == [f"{model_folder}: its earlier results go, being of other weights_sha256"]


def test_calls_on_other_models_may_run_at_once(settings, model_folder, open_model, tmp_path):
    path, names = tmp_path / "eval.json", [f"{model_folder}/../{model_folder.name}", "another"]
    first, second = (Evaluation([], settings, path, str) for _ in names)
    first.evaluate(names[0], open_model)
    second.evaluate(names[1], lambda _: open_model(model_folder))
    assert [*json.loads(path.read_text())["models"]] == names == [*second.results["models"]]


def test_cut_prompts_are_counted_and_told(tasks, settings, model_folder, open_model, tmp_path):
    """Of 16 prompts of 2 examples, none fits; answers by generation need room for 256 tokens."""
    told, path = [], tmp_path / "eval.json"
    short = replace(settings, max_length=20)
    failed = Evaluation(tasks[:2], short, path, told.append).evaluate(str(model_folder), open_model)
    result = record_of(path, model_folder)["tasks"]["sciq-2"]
    assert result["cut_prompts"] == 64
    assert told[1] == (
        "  64 of 64 prompts are longer than the 20 tokens of --max-length and lost their beginning"
    )
    assert len(failed) == 1 and "nq_open-1: " in failed[0] and "(256) must be less" in failed[0]
    assert told[3].startswith("  error: ")


def test_a_right_answer_that_is_no_choice_fails_the_task(
    settings, model_folder, open_model, tmp_path
):
    """The harness would count it as a wrong answer."""
    path = tmp_path / "baber/piqa/default/validation.jsonl"
    path.parent.mkdir(parents=True)
    question = {"goal": "w1", "sol1": "w2", "sol2": "w3"}
    path.write_text("".join(json.dumps(question | {"label": label}) + "\n" for label in (0, 2, 2)))
    tasks = [PresetTask("piqa", "PIQA", 0, "acc", "piqa")]
    wrong = replace(settings, data_dir=tmp_path)
    evaluation = Evaluation(tasks, wrong, tmp_path / "eval.json", str)
    (failed,) = evaluation.evaluate(str(model_folder), open_model)
    assert "piqa-0: ValueError: 2 times such as: Label index was not in within range" in failed
    assert record_of(tmp_path / "eval.json", model_folder)["tasks"] == {}


def test_what_would_fail_is_found_before_a_model_is_loaded(tasks, settings, tmp_path):
    manager = find_tasks(tasks)
    assert find_problems(manager, tasks, settings) == []
    without = replace(settings, run_code=False, data_dir=tmp_path)
    problems = find_problems(manager, tasks, without)
    assert problems[0].startswith("humaneval_pass_at_10-0: it runs Python programs that the model")
    tydiqa = "google-research-datasets/tydiqa"
    assert (
        f"tydiqa-1: {tmp_path}/{tydiqa}/secondary_task/train.jsonl: missing. Write it from "
        + (f"split train of {tydiqa} (secondary_task)")
        in problems
    )
    assert [line.split(": ")[0] for line in problems[1:]] == [
        *("sciq-2", "sciq-2", "nq_open-1", "nq_open-1", "tydiqa-1", "tydiqa-1"),
        "humaneval_pass_at_10-0",
    ]
    assert find_problems(manager, tasks[:1], replace(settings, data_dir=None)) == []


def test_prompts_take_the_form_of_the_chat_template(
    tasks, settings, model_folder, open_model, tmp_path, monkeypatch
):
    """Each example is a turn; a tokenizer without a template is no reason for other prompts."""
    seen = []

    def count(self, requests, **_):
        seen.extend(prompt for (prompt, _), *_ in requests)
        return [(0.0, False)] * len(requests)

    @contextmanager
    def with_template(source, **_):
        with open_model(source) as opened:
            form = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
            opened.tokenizer.chat_template = form
            yield opened

    path, chat = tmp_path / "eval.json", replace(settings, chat=True)
    failed = Evaluation(tasks[:1], chat, path, str).evaluate(str(model_folder), open_model)
    assert len(failed) == 1 and "chat template" in failed[0]
    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", count)
    assert Evaluation(tasks[:1], chat, path, str).evaluate(str(model_folder), with_template) == []
    assert seen[0].startswith("[user]w") and seen[0].count("[assistant]w") == 2
    assert record_of(path, model_folder)["tasks"]["sciq-2"]["identity"]["chat"] is True
