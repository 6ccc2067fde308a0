"""The logger `local_metrics`: what a run logs, in files beside its checkpoints."""

import logging
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from apex_composer.callbacks.metrics_file import (
    BATCH,
    EVALUATION,
    NAME,
    SETTINGS,
    STAGE,
    START,
    Line,
    MetricsFile,
)
from apex_composer.callbacks.run_facts import device_name, versions
from apex_composer.callbacks.stage_file import write_stage
from apex_composer.distributed import global_rank, sum_over_ranks
from apex_composer.extras import needing
from apex_composer.settings import check_keys, check_positive

with needing("LocalMetrics"):
    from composer.callbacks import CheckpointSaver
    from composer.core import State
    from composer.loggers import Logger, LoggerDestination
    from composer.utils.file_helpers import format_name_with_dist

    from apex_composer.trainer.algorithm import APEX

log = logging.getLogger(__name__)

# The clock, which every line has anyway.
CLOCK = {
    f"time/{name}"
    for name in (
        "batch",
        "sample",
        "token",
        "epoch",
        "batch_in_epoch",
        "sample_in_epoch",
        "token_in_epoch",
    )
}
FOLDER = "metrics"
CROSS_ENTROPY = "LanguageCrossEntropy"


class LocalMetrics(LoggerDestination):
    """Writes what is logged to `metrics.jsonl`, and APEX's stages to `stage<n>-ba<batch>.npz`.

    llm-foundry's logger `local_metrics`, which `apex-composer report` reads. Rank 0 writes: every
    number with the batches, tokens, samples and seconds of training before it (tensors stay on
    their device until the batch's end and come in one transfer); the configuration (`log_config:
    true`, llm-foundry's default), versions and device; the predicted tokens of every evaluation; of
    every stage the record and the scores that it was selected by. A line is with the operating
    system as soon as it is written, so that a killed process loses the running batch. A run that
    goes on from a checkpoint goes on in its file. `metrics_file` says what becomes of the file when
    it has grown to its limit, and of lines that a full disk does not take.

    Args:
        folder: where; `{run_name}` is replaced. Default None: `metrics` beside the checkpoints'
            folder where that lies in a folder of the run's name, in the checkpoints' folder
            otherwise, and `runs/<run_name>/metrics` in a run without checkpoints.
        limit: megabytes that the file stays below by thinning, evaluations excepted. Default 32.

    Raises:
        ValueError: limit is not positive.
        TypeError: for unknown settings.
        OSError: the folder cannot be written to, when the trainer is built.
    """

    def __init__(self, folder: str | None = None, limit: float = 32.0, **unknown: Any):
        check_keys("local_metrics", unknown, ("folder", "limit"))
        self._limit = int(1e6 * check_positive("local_metrics: limit", limit, float))
        self._given = folder
        self._file: MetricsFile | None = None
        self._state: State | None = None
        self._settings: dict[str, Any] = {}
        self._during: dict[str, Any] = {}  # logged while a batch was trained
        self._metrics: dict[str, Any] = {}  # logged since the clock has moved on
        self._record: dict[str, Any] | None = None  # of the last stage that is written
        self._warned = False  # that this stage could not be written
        self._batch = 0  # of the last line
        self._running: int | None = None  # batches before the one that is being trained

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Write settings, or keep them until the run knows at which batch it starts."""
        self._settings |= hyperparameters
        if self._file is not None:
            self._write_settings()

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Keep numbers until the event's end; those with a step of the running batch apart."""
        # On every rank: what is spread over the ranks is put together by all of them.
        metrics = {name: _whole(value) for name, value in metrics.items() if name not in CLOCK}
        if self._state is None or global_rank() != 0:
            return
        step = self._state.timestamp.batch.value if step is None else step
        kept = {name: value for name, value in metrics.items() if value is not None}
        (self._during if step == self._running else self._metrics).update(kept)

    def init(self, state: State, logger: Logger) -> None:
        """Find the folder."""
        self._state = state
        if global_rank() == 0:
            self.folder = find_folder(self._given, state)

    def after_load(self, state: State, logger: Logger) -> None:
        """Open the file: now it is known whether the run goes on from a checkpoint."""
        if global_rank() == 0:
            self._file = MetricsFile(self.folder / NAME, self._limit)
            self._start(state)

    def fit_start(self, state: State, logger: Logger) -> None:
        """A clock that was set back begins anew; of a resumed run the stages so far are noted."""
        if self._file is None:
            return
        if state.timestamp.batch.value < self._batch:
            self._start(state)
        self._write_stages(state)

    def batch_start(self, state: State, logger: Logger) -> None:
        """What is logged from here on belongs to the batch, until the clock moves on."""
        self._during, self._metrics = self._metrics, {}
        self._running = state.timestamp.batch.value

    def batch_end(self, state: State, logger: Logger) -> None:
        """The batch's line."""
        self._running = None
        if self._file is None:
            return
        now, before = state.timestamp, state.previous_timestamp
        clock = {
            "took": now.batch_wct.total_seconds(),
            "trained": now.token.value - before.token.value,
        }
        self._write(BATCH, **clock, during=_plain(self._during), metrics=_plain(self._metrics))
        self._during, self._metrics = {}, {}
        self._write_stages(state)

    def eval_end(self, state: State, logger: Logger) -> None:
        """The evaluation of one domain, with its number of predicted tokens (collective)."""
        label = state.dataloader_label
        metric = state.eval_metrics.get(label, {}).get(CROSS_ENTROPY)
        predicted = {}
        if metric is not None and hasattr(metric, "total_items"):
            predicted[label] = int(sum_over_ranks(metric.total_items.detach().clone()))
        self._flush(predicted=predicted)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """What is computed from all domains."""
        self._flush()

    eval_standalone_end = fit_end = eval_after_all

    def close(self, state: State, logger: Logger) -> None:
        """Also after an error."""
        if self._file is None:
            return
        self._flush()
        self._file.close()
        self._file = None

    def _start(self, state: State) -> None:
        self._batch, self._record = state.timestamp.batch.value, None
        self._write(
            START,
            run_name=state.run_name,
            began=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            versions=versions(),
            device=device_name(),
        )
        self._write_settings()

    def _write_settings(self) -> None:
        if self._settings:
            self._write(SETTINGS, settings=self._settings)
        self._settings = {}

    def _flush(self, **more: Any) -> None:
        if self._file is not None and (self._metrics or any(more.values())):
            self._write(EVALUATION, metrics=_plain(self._metrics), **more)
        self._metrics = {}

    def _write(self, kind: str, **content: Any) -> None:
        now = self._state.timestamp
        self._batch = now.batch.value
        clock: Line = {
            "kind": kind,
            "batch": self._batch,
            "tokens": now.token.value,
            "samples": now.sample.value,
            "seconds": now.total_wct.total_seconds(),
        }
        self._file.append(clock | content)

    def _write_stages(self, state: State) -> None:
        """Stages that have begun since the last time; after a resumption all."""
        apex = next((a for a in state.algorithms if isinstance(a, APEX)), None)
        history = apex.history if apex is not None else []
        if not history or history[-1] is self._record:
            return
        known = (place for place, record in enumerate(history) if record is self._record)
        begun = history[next(known, -1) + 1 :]
        names = [f"stage{record['stage']}-ba{record['start_batch']}.npz" for record in begun]
        try:
            for record, name in zip(begun, names, strict=True):
                ranked = apex.expander.ranked if record is history[-1] else {}
                write_stage(self.folder / name, record, apex.expander, ranked)
        except OSError as error:
            if not self._warned:
                reason = os.strerror(error.errno or 0)
                log.warning("local_metrics: a stage cannot be written yet (%s)", reason)
            self._warned = True
            return  # and the next batch tries again
        for record, name in zip(begun, names, strict=True):
            self._write(STAGE, stage=record["stage"], file=name)
        self._record, self._warned = history[-1], False


def find_folder(given: str | None, state: State) -> Path:
    """The folder of a run's metrics, see `LocalMetrics`."""
    if given is not None:
        return Path(format_name_with_dist(given, state.run_name))
    saver = next((c for c in state.callbacks if isinstance(c, CheckpointSaver)), None)
    if saver is None:
        return Path("runs") / state.run_name / FOLDER
    folder = Path(format_name_with_dist(saver.folder, state.run_name))
    return (folder.parent if folder.parent.name == state.run_name else folder) / FOLDER


def _whole(value: Any) -> Any:
    """A number or text; a tensor of one element as a copy on its device; None for the rest."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if isinstance(value, np.ndarray | np.generic):
        value = value.item() if value.size == 1 else None
    if isinstance(value, torch.Tensor):
        # A copy, since its owner may write the next value into it.
        single = value.numel() == 1 and not value.is_complex()
        return value.detach().reshape(()).to(torch.float64, copy=True) if single else None
    return value if isinstance(value, bool | int | float | str) else None


def _plain(metrics: dict[str, Any]) -> dict[str, Any]:
    """Numbers and texts; the tensors of a device come over all at once: one wait, not many."""
    plain = dict(metrics)
    by_device: dict[torch.device, list[str]] = {}
    for name, value in metrics.items():
        if isinstance(value, torch.Tensor):
            by_device.setdefault(value.device, []).append(name)
    for names in by_device.values():
        numbers = torch.stack([metrics[name] for name in names]).tolist()
        plain.update(zip(names, numbers, strict=True))
    return plain
