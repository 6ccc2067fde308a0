"""One run in a process of its own: `python -m apex_composer.demo.run CONFIG.yaml`.

It starts llm-foundry as `composer train.py CONFIG.yaml` does, and keeps what the in-memory logger
has seen.
"""

import sys
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from apex_composer.data_prep.atomic_files import write_json

METRICS = "metrics.json"
OPERATOR_NORM = "apex/operator_norm/"
CROSS_ENTROPY = "metrics/eval/{domain}/LanguageCrossEntropy"


def run(config: Path) -> None:
    """Train with llm-foundry and write `metrics.json` beside the configuration.

    Args:
        config: a complete llm-foundry training YAML with the logger `inmemory`.
    """
    with Console().status("starting llm-foundry"):
        from llmfoundry.command_utils import train
        from omegaconf import OmegaConf

    settings = OmegaConf.load(config)
    domains = [loader.label for loader in settings.eval_loader]
    started = time.perf_counter()
    trainer = train(settings)
    write_json(
        config.parent / METRICS,
        collect_metrics(trainer, domains) | {"run_seconds": time.perf_counter() - started},
    )
    trainer.close()


def collect_metrics(trainer: Any, domains: list[str]) -> dict[str, Any]:
    """Take a finished run's numbers out of its trainer.

    Args:
        trainer: Composer trainer after `fit`, with an InMemoryLogger.
        domains: labels of the evaluation loaders.

    Returns:
        `loss` and `step_seconds` per batch, `cross_entropy` per domain in nats per token,
        `stages` (the history of an algorithm that has one), `operator_norms` (per projection,
        pairs of batch and |T W[P]| / |W[N]|), `device` and `threads`.
    """
    import torch
    from composer.loggers import InMemoryLogger

    logger = next(d for d in trainer.logger.destinations if isinstance(d, InMemoryLogger))
    losses = logger.data["loss/train/total"]
    # A batch's loss is logged before the clock moves on, so its duration ends at the next entry.
    clock = [timestamp.total_wct for timestamp, _ in losses] + [trainer.state.timestamp.total_wct]
    last = logger.most_recent_values
    histories = (getattr(algorithm, "history", None) for algorithm in trainer.state.algorithms)
    cuda = torch.cuda.is_available()
    return {
        "loss": [float(loss) for _, loss in losses],
        "step_seconds": durations(clock),
        "cross_entropy": {d: float(last[CROSS_ENTROPY.format(domain=d)]) for d in domains},
        "stages": next((history for history in histories if history is not None), []),
        "operator_norms": {
            name.removeprefix(OPERATOR_NORM): [(int(t.batch), float(v)) for t, v in entries]
            for name, entries in logger.data.items()
            if name.startswith(OPERATOR_NORM)
        },
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
    }


def durations(clock: list[timedelta]) -> list[float]:
    """Turn a clock's readings into the seconds between them.

    Args:
        clock: time since the run's start, evaluation left out.
    """
    return [(after - before).total_seconds() for before, after in pairwise(clock)]


if __name__ == "__main__":
    run(Path(sys.argv[1]))
