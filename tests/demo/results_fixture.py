"""Metrics of three invented runs, and their summary."""

from dataclasses import replace

from apex_composer.demo.from_scratch import Prepared
from apex_composer.demo.results import summarise

PREPARED = Prepared(
    domains=["arxiv", "github"],
    documents=9,
    are_sections=False,
    tokenizer={"sha256": "0" * 64, "vocabulary_size": 300},
    splits={
        split: {
            "arxiv": {"documents": 2, "tokens": 35, "sequences": 3},
            "github": {"documents": 1, "tokens": 12, "sequences": 1},
        }
        for split in ("validation", "pretrain", "train")
    },
)
SETTINGS = {
    "seed": 17,
    "precision": "fp32",
    "max_seq_len": 11,
    "variables": {"batches": 12},
    "train_loader": {"dataset": {"shuffle_seed": 17}},
}


def example_losses(offset: float) -> list[float]:
    """A falling loss of twelve batches."""
    return [4.0 - 0.1 * batch + offset for batch in range(12)]


def example_metrics(offset: float, seconds: float) -> dict:
    """What a run leaves in `metrics.json`."""
    return {
        "loss": example_losses(offset),
        "step_seconds": [seconds] * 12,
        "cross_entropy": {"arxiv": 2.0 + offset, "github": 2.0 + offset},
        "stages": [{"stage": i, "start_batch": 4 * i} for i in range(3)],
        "device": "cpu",
        "threads": 2,
        "run_seconds": 10.0,
    }


def example_summary(**changes) -> dict:
    """The summary of the three runs; changes are made to what was prepared."""
    metrics = {
        "base": example_metrics(1.0, 1.0),
        "vanilla": example_metrics(0.0, 1.0),
        "apex": example_metrics(-0.1, 1.5),
    }
    return summarise(metrics, replace(PREPARED, **changes), dict.fromkeys(metrics, SETTINGS))
