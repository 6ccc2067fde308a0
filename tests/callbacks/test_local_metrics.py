import errno

import numpy
import pytest
import torch
from composer import Callback, Evaluator
from composer.metrics import LanguageCrossEntropy
from composer_run import BATCH_SIZE, StopAt, make_trainer
from helpers import TokenDataset
from torch.utils.data import DataLoader

from apex_composer import APEX
from apex_composer.callbacks import stage_file
from apex_composer.callbacks.local_metrics import LocalMetrics
from apex_composer.callbacks.metrics_file import NAME, read_lines
from apex_composer.data_prep.atomic_files import write_bytes
from apex_composer.methods.s2ft import S2FT
from apex_composer.report.read_run import read_runs


class Logs(Callback):
    """Logs the clock, in the batch and after it."""

    def before_forward(self, state, logger):
        logger.log_metrics({"in/batch": torch.tensor(float(state.timestamp.batch.value))})

    def batch_end(self, state, logger):
        logger.log_metrics({"after/batch": state.timestamp.batch.value, "table": torch.ones(2)})


def start(folder, *, apex=None, callbacks=(), **options):
    algorithms = [] if apex is None else [apex]
    return make_trainer(
        *algorithms, loggers=[LocalMetrics(str(folder))], callbacks=(Logs(), *callbacks), **options
    )


def train(folder, **options):
    trainer = start(folder, **options)
    trainer.fit()
    trainer.close()
    return trainer


def lines_of(folder, kind):
    return [line for line in read_lines(folder / NAME)[0] if line["kind"] == kind]


def evaluators():
    loader = DataLoader(TokenDataset(6), batch_size=2)
    return [
        Evaluator(label=label, dataloader=loader, metric_names=["LanguageCrossEntropy"])
        for label in ("eval/cc", "eval/c4")
    ]


def test_every_number_has_the_clock_at_which_it_was_logged(tmp_path):
    train(tmp_path)
    (run,) = read_runs([tmp_path])
    assert run.loss.batches == [0, 1, 2, 3, 4, 5]
    assert run.metrics["in/batch"].values == [0, 1, 2, 3, 4, 5]
    assert run.metrics["in/batch"].batches == [0, 1, 2, 3, 4, 5]
    assert run.metrics["after/batch"].values == [1, 2, 3, 4, 5, 6]
    assert run.metrics["after/batch"].batches == [1, 2, 3, 4, 5, 6]
    assert "table" not in run.metrics and "time/batch" not in run.metrics
    assert len(run.step_seconds) == 6 and min(run.step_seconds) > 0
    own = lines_of(tmp_path, "batch")
    assert [line["samples"] for line in own] == [BATCH_SIZE * k for k in range(1, 7)]
    assert sum(line["took"] for line in own) == pytest.approx(own[-1]["seconds"])
    assert run.versions["torch"] == torch.__version__.split("+")[0] or run.versions["torch"]
    assert run.device.startswith("cpu")


def test_evaluations_have_their_loss_and_their_number_of_predicted_tokens(tmp_path):
    train(
        tmp_path,
        eval_dataloader=evaluators(),
        eval_interval="2ba",
        eval_metrics=[LanguageCrossEntropy()],
    )
    (run,) = read_runs([tmp_path])
    assert run.validation.keys() == {"cc", "c4"}
    assert run.validation["cc"].batches == [2, 4, 6]
    labels = torch.cat([batch["labels"] for batch in evaluators()[0].dataloader.dataloader])
    assert run.validation_tokens["cc"] == (labels[:, 1:] != -100).sum()


def test_a_stage_is_kept_with_the_scores_that_selected_it(tmp_path):
    apex = APEX(threshold=0.25, stages=2, assessment={"tokens": 64})
    train(tmp_path, apex=apex)
    (run,) = read_runs([tmp_path])
    assert [stage.number for stage in run.stages] == [0, 1]
    assert [stage.batch for stage in run.stages] == [0, 3]
    for stage, record in zip(run.stages, apex.history, strict=True):
        assert stage.advantageous == record["advantageous"]
        for group, chosen in stage.advantageous.items():
            if group not in stage.scores:
                assert stage.units[group] == "kv_head"
                continue
            scores = numpy.array(stage.scores[group])
            others = numpy.delete(scores, chosen)
            assert scores[list(chosen)].min() >= others.max()
    assert run.metrics["apex/stage"].values


def test_a_run_that_was_killed_goes_on_in_its_file_and_each_batch_is_there_once(tmp_path):
    """It had trained beyond its checkpoint, and died within a line."""
    checkpoints = tmp_path / "checkpoints"
    options = {"save_folder": str(checkpoints), "save_interval": "2ba", "run_name": "killed"}
    apex = {"threshold": 0.25, "stages": 2, "assessment": {"tokens": 64}}
    folder = tmp_path / "metrics"
    trainer = start(folder, apex=APEX(**apex), callbacks=(StopAt(3),), **options)
    trainer.fit()
    trainer.close()
    with (folder / NAME).open("ab") as file:
        file.write(b'{"kind":"batch","batch":4,"tok')
    assert [line["batch"] for line in lines_of(folder, "batch")] == [1, 2, 3]
    train(
        folder,
        apex=APEX(**apex),
        load_path=str(checkpoints / "ep0-ba2-rank0.pt"),
        **options,
        save_overwrite=True,
    )
    lines, damaged = read_lines(folder / NAME)
    assert damaged == 0
    assert [line["batch"] for line in lines if line["kind"] == "batch"] == [1, 2, 3, 4, 5, 6]
    assert [line["batch"] for line in lines if line["kind"] == "start"] == [0, 2]
    (run,) = read_runs([tmp_path])
    assert run.folder == tmp_path and len(run.loss.values) == 6
    assert [stage.batch for stage in run.stages] == [0, 3] and all(s.scores for s in run.stages)


@pytest.mark.parametrize("kind", ["plain", "s2ft"])
def test_stages_without_operators_are_kept_too(tmp_path, kind):
    plain = APEX(stages=1, threshold=0.25, expansion=False, assessment={"tokens": 64})
    apex = plain if kind == "plain" else S2FT(trainable_share=0.35)
    train(tmp_path, apex=apex, max_duration="2ba")
    (run,) = read_runs([tmp_path])
    (stage,) = run.stages
    assert not stage.expansion and stage.advantageous == apex.history[0]["advantageous"]
    assert bool(stage.scores) == (kind == "plain")


@pytest.mark.parametrize("method", ["rank", "random"])
def test_a_stage_of_an_earlier_run_in_the_folder_is_replaced(tmp_path, method):
    for seed in (1, 2):
        settings = {"method": method, **({"tokens": 64} if method == "rank" else {})}
        apex = APEX(threshold=0.25, stages=1, assessment=settings, seed=seed)
        train(tmp_path, apex=apex, max_duration="1ba")
    (run,) = read_runs([tmp_path])
    assert run.stages[0].advantageous == apex.history[0]["advantageous"]
    assert bool(run.stages[0].scores) == (method == "rank")


def test_a_stage_that_the_disk_has_no_room_for_is_written_later(tmp_path, monkeypatch, caplog):
    """A full disk does not end the training, and does not cost the scores."""
    full = [errno.ENOSPC] * 2

    def write_or_not(path, content):
        if full:
            raise OSError(full.pop(), "what atomic_files says")
        write_bytes(path, content)

    monkeypatch.setattr(stage_file, "write_bytes", write_or_not)
    apex = APEX(threshold=0.25, stages=2, assessment={"tokens": 64})
    train(tmp_path, apex=apex)
    (run,) = read_runs([tmp_path])
    assert not full and [stage.batch for stage in run.stages] == [0, 3]
    assert all(stage.scores for stage in run.stages)
    assert caplog.text.count("a stage cannot be written yet (No space left") == 1


def test_a_stage_that_ends_before_there_is_room_comes_without_scores(tmp_path, monkeypatch):
    full = [errno.ENOSPC] * 2

    def write_or_not(path, content):
        if full and path.name == "stage1-ba2.npz":
            raise OSError(full.pop(), "")
        write_bytes(path, content)

    monkeypatch.setattr(stage_file, "write_bytes", write_or_not)
    train(tmp_path, apex=APEX(threshold=0.25, stages=3, assessment={"tokens": 64}))
    (run,) = read_runs([tmp_path])
    assert [stage.batch for stage in run.stages] == [0, 2, 4]
    assert [stage.scores is None for stage in run.stages] == [False, True, False]
    assert "scores of stage 1: it began before they were kept" in run.missing


def test_tensors_come_from_their_device_all_at_once_with_the_value_that_was_logged(
    tmp_path, monkeypatch
):
    value, waits, really = torch.zeros(()), [], torch.Tensor.tolist

    class Reused(Callback):
        def batch_start(self, state, logger):
            value.fill_(state.timestamp.batch.value)
            numbers = {f"number/{k}": value + k for k in range(20)}
            logger.log_metrics({"reused": value, "one": value[None], "no": 1j * value, **numbers})
            value.fill_(-1)

    def count(tensor):
        waits.append(tensor)
        return really(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", count)
    train(tmp_path, callbacks=[Reused()], max_duration="3ba")
    assert len([tensor for tensor in waits if tensor.dtype == torch.float64]) == 3
    (run,) = read_runs([tmp_path])
    assert run.metrics["reused"].values == run.metrics["one"].values == [0, 1, 2]
    assert run.metrics["number/7"].values == [7, 8, 9] and "no" not in run.metrics


def test_an_autoresumed_run_of_another_length_is_one_run(tmp_path):
    saving = {"save_folder": str(tmp_path / "checkpoints"), "save_interval": "2ba"}
    saving |= {"run_name": "r", "autoresume": True}
    apex = {"threshold": 0.25, "stages": ["4ba", "2ba"], "assessment": {"tokens": 64}}
    trainer = start(tmp_path / "metrics", apex=APEX(**apex), callbacks=[StopAt(5)], **saving)
    trainer.fit()
    trainer.close()
    apex["stages"] = ["4ba", "2ba", "2ba"]
    train(tmp_path / "metrics", apex=APEX(**apex), max_duration="8ba", **saving)
    (run,) = read_runs([tmp_path])
    assert run.loss.batches == [*range(8)]
    assert [stage.batch for stage in run.stages] == [0, 4, 6] and all(s.scores for s in run.stages)


def test_evaluations_before_the_fit_and_without_one_and_a_second_fit(tmp_path):
    options = {"eval_dataloader": evaluators(), "eval_metrics": [LanguageCrossEntropy()]}
    trainer = start(tmp_path, max_duration="2ba", **options)
    trainer.eval()
    (run,) = read_runs([tmp_path])
    assert run.validation["cc"].batches == [0] and run.validation["cc"].tokens == [0]
    trainer.fit()
    trainer.fit(duration="2ba")
    trainer.eval()
    (run,) = read_runs([tmp_path])
    assert run.loss.batches == [0, 1, 2, 3]
    assert run.validation["cc"].batches[0] == 0 and run.validation["cc"].batches[-1] == 4
    trainer.fit(duration="1ba", reset_time=True)
    trainer.close()
    (run,) = read_runs([tmp_path])
    assert run.loss.batches == [0]


def test_a_run_that_begins_anew_supersedes_the_one_before(tmp_path):
    train(tmp_path, max_duration="4ba")
    train(tmp_path, max_duration="2ba")
    assert [line["batch"] for line in lines_of(tmp_path, "batch")] == [1, 2]


def test_the_folder_lies_beside_the_checkpoints_of_the_run(tmp_path):
    for folder, expected in (("r/checkpoints", "r/metrics"), ("other", "other/metrics")):
        logger = LocalMetrics()
        options = {"run_name": "r", "save_folder": str(tmp_path / folder), "save_interval": "9ba"}
        make_trainer(loggers=[logger], **options).close()
        assert logger.folder == tmp_path / expected and (tmp_path / expected / NAME).is_file()


def test_settings_are_checked():
    with pytest.raises(ValueError, match="local_metrics: limit: got 0"):
        LocalMetrics(limit=0)
    with pytest.raises(TypeError, match="Did you mean 'folder'"):
        LocalMetrics(folde="x")
