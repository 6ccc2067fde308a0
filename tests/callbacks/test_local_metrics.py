from composer_run import BATCH_SIZE, make_trainer

from apex_composer.callbacks.local_metrics import LocalMetrics
from apex_composer.callbacks.metrics_file import NAME, read_lines


def train(folder, *, duration="6ba", callbacks=(), apex=None, **options):
    trainer = make_trainer(
        *([apex] if apex else []),
        loggers=[LocalMetrics(str(folder))],
        max_duration=duration,
        callbacks=callbacks,
        **options,
    )
    trainer.fit()
    trainer.close()
    return trainer


def batches(folder):
    return [line for line in read_lines(folder / NAME)[0] if line["kind"] == "batch"]


def test_every_batch_has_a_line_with_the_clock_around_it(tmp_path):
    train(tmp_path)
    lines, damaged = read_lines(tmp_path / NAME)
    assert damaged == 0 and lines[0]["kind"] == "start"
    own = batches(tmp_path)
    assert [line["batch"] for line in own] == [1, 2, 3, 4, 5, 6]
    assert all(line["during"]["loss/train/total"] > 0 and line["took"] > 0 for line in own)
    assert [line["samples"] for line in own] == [BATCH_SIZE * k for k in range(1, 7)]
    assert lines[0]["versions"]["torch"] and lines[0]["device"].startswith("cpu")
