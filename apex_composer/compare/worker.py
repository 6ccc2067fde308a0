"""One run in a process of its own, and the numbers that are taken out of it."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from apex_composer.data_prep.atomic_files import write_json
from apex_composer.demo.run import collect_metrics

CONFIG, LOG, RESULT = "config.yaml", "log.txt", "result.json"
HELD_OUT = "held_out"  # label of the evaluation loader


def work(folder: str, identity: str) -> None:
    """Train what `<folder>/config.yaml` says into `<folder>/log.txt` and `<folder>/result.json`.

    Args:
        identity: kept with the result, which is that of these settings and inputs only.
    """
    log = os.open(Path(folder) / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    write_json(Path(folder) / RESULT, {"identity": identity, **train(Path(folder) / CONFIG)})


def train(config: Path) -> dict[str, Any]:
    """Train with llm-foundry and measure.

    Args:
        config: a complete llm-foundry YAML with the logger `inmemory` and the callback
            `held_memory`.

    Returns:
        `training_loss` (per batch), `held_out_loss` (nats per token of the answers),
        `trained_share`, `step_seconds` (per batch), `optimizer_bytes`, `method_bytes`,
        `run_seconds`, `device` and `threads`.
    """
    from llmfoundry.command_utils import train as start
    from omegaconf import OmegaConf

    settings, began = OmegaConf.load(config), time.perf_counter()
    trainer = start(settings)
    if settings.variables.get("average_checkpoints"):
        evaluate_average(trainer, config.parent / "averaged")
    found, logged = collect_metrics(trainer, [HELD_OUT]), logged_numbers(trainer)
    if not settings.optimizer.lr:  # the base model, which is evaluated this way
        logged["base/trained_share"] = 0.0
    result = {
        "training_loss": found["loss"],
        "held_out_loss": found["cross_entropy"][HELD_OUT],
        "trained_share": trained_share(trainer.state.model, logged),
        "step_seconds": found["step_seconds"],
        "optimizer_bytes": int(logged.get("held/optimizer_bytes", 0)),
        "method_bytes": int(logged.get("held/method_bytes", 0)),
        "device": found["device"],
        "threads": found["threads"],
    }
    trainer.close()
    return result | {"run_seconds": time.perf_counter() - began}


def evaluate_average(trainer: Any, out: Path) -> None:
    """Evaluate the mean of a run's kept checkpoints in the place of its last weights.

    Args:
        trainer: Composer trainer after `fit`. What an earlier run has left in the folder of its
            checkpoints is not among them.
        out: folder for the mean, as `apex-composer merge` writes it.
    """
    from transformers import AutoModelForCausalLM

    from apex_composer.tools.merge import merge

    kept = [Path(path) for path in trainer.saved_checkpoints]
    merge(kept, out, overwrite=True)
    weights = AutoModelForCausalLM.from_pretrained(out).state_dict()
    trainer.state.model.model.load_state_dict(weights)
    trainer.eval()


def logged_numbers(trainer: Any) -> dict[str, Any]:
    """The last value of everything that the in-memory logger has seen."""
    from composer.loggers import InMemoryLogger

    loggers = trainer.logger.destinations
    return dict(next(d for d in loggers if isinstance(d, InMemoryLogger)).most_recent_values)


def trained_share(model: Any, logged: dict[str, Any]) -> float:
    """What can move over the parameters of the base model, by each method's own account.

    A method that trains parts of weights logs `<method>/trained_share`. Otherwise it is what is
    not frozen, weights that a method has added included.

    Args:
        model: before its trainer is closed.
        logged: see `logged_numbers`.
    """
    from apex_composer.callbacks.held_memory import ADDED

    told = [share for name, share in logged.items() if name.endswith("/trained_share")]
    if told:
        return float(told[0])
    sizes = [(name, p.numel(), p.requires_grad) for name, p in model.named_parameters()]
    base = sum(size for name, size, _ in sizes if ADDED not in name)
    return sum(size for _, size, moves in sizes if moves) / base
