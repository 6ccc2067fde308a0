from datetime import timedelta
from types import SimpleNamespace

import pytest
from composer.core import Timestamp
from composer.loggers import InMemoryLogger

from apex_composer.demo.run import collect_metrics, durations


def finished_trainer(algorithms=()):
    """What is left of a trainer after two batches of 3 s and 2 s."""
    logger = InMemoryLogger()
    state = SimpleNamespace(timestamp=Timestamp(), algorithms=list(algorithms))
    logger.init(state, None)
    for batch, seconds in enumerate((3, 2)):
        logger.log_metrics({"loss/train/total": 5.0 - batch})
        state.timestamp = state.timestamp.to_next_batch(duration=timedelta(seconds=seconds))
        logger.log_metrics({"apex/operator_norm/q_proj": batch / 10})
    logger.log_metrics({"metrics/eval/arxiv/LanguageCrossEntropy": 4.5})
    return SimpleNamespace(state=state, logger=SimpleNamespace(destinations=[logger]))


def test_losses_times_and_cross_entropies_are_taken_from_the_trainer():
    metrics = collect_metrics(finished_trainer(), ["arxiv"])
    assert metrics["loss"] == [5.0, 4.0]
    assert metrics["step_seconds"] == [3.0, 2.0]
    assert metrics["cross_entropy"] == {"arxiv": 4.5}
    assert metrics["operator_norms"] == {"q_proj": [(1, 0.0), (2, 0.1)]}
    assert metrics["stages"] == []


def test_the_stages_are_those_of_the_algorithm_that_has_a_history():
    algorithms = [SimpleNamespace(), SimpleNamespace(history=[{"stage": 0}])]
    assert collect_metrics(finished_trainer(algorithms), ["arxiv"])["stages"] == [{"stage": 0}]


def test_a_domain_without_an_evaluation_is_an_error():
    with pytest.raises(KeyError, match="book"):
        collect_metrics(finished_trainer(), ["book"])


def test_a_batch_lasts_until_the_next_reading_of_the_clock():
    clock = [timedelta(seconds=s) for s in (0, 2, 2.5, 4)]
    assert durations(clock) == [2.0, 0.5, 1.5]
