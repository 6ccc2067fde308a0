"""A training run in a process of its own, which may kill itself: `test_killed_runs.py` starts it.

Usage: resume_worker.py DATA FOLDER DEATH [FOLDER DEATH ...]. Of several runs each has a process of
its own, one after the other, all forked from this one, which has imported everything and prints
their exit statuses. DEATH is one of
    none        to the end
    kill-N      SIGKILL at the end of batch N, before its checkpoint is written
    save-N      SIGKILL in the middle of writing the checkpoint of batch N
    assess-0    SIGKILL in the first assessment
    term-N      SIGTERM at the end of batch N; twice-N sends two that count as two
    group-N     SIGTERM to the whole process group, as a cluster does; one-N to the last rank only
    lost-N      SIGKILL to the last rank only
"""

import json
import os
import signal
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")

import own_names
import torch
from composer import Callback, Trainer
from composer.models import HuggingFaceModel
from composer.utils import checkpoint as composer_checkpoint
from composer.utils import dist
from composer_run import StreamedTokens
from forks import exit_status, fork
from helpers import tiny_llama
from streaming import StreamingDataLoader

from apex_composer import APEX, StagewiseScheduler
from apex_composer.callbacks import preemption
from apex_composer.trainer import first_assessment

torch.set_num_threads(1)


SIGNALS = {
    "kill": [signal.SIGKILL],
    "term": [signal.SIGTERM],
    "twice": [signal.SIGTERM, signal.SIGTERM],
}


class Die(Callback):
    """Signals this process at the end of a batch."""

    def __init__(self, signals: list[int], batch: int):
        self.signals, self.batch = signals, batch

    def batch_end(self, state, logger):
        if state.timestamp.batch.value == self.batch:
            for number in self.signals:
                os.kill(os.getpid(), number)


class Preempt(Callback):
    """Acts as a cluster at the end of a batch."""

    def __init__(self, everybody: bool, batch: int, number: int = signal.SIGTERM):
        self.everybody, self.batch, self.number = everybody, batch, number

    def batch_end(self, state, logger):
        rank, ranks = dist.get_global_rank(), dist.get_world_size()
        if state.timestamp.batch.value != self.batch:
            return
        if self.everybody and rank == 0:
            os.killpg(os.getpgrp(), self.number)
        elif not self.everybody and rank == ranks - 1:
            os.kill(os.getpid(), self.number)


def die_while_saving(batch: int) -> None:
    """Cut the checkpoint of a batch off in the middle."""
    write = composer_checkpoint._write_checkpoint_file

    def cut(state, filename):
        write(state, filename)
        if f"ba{batch}-" in filename:
            os.truncate(filename, os.path.getsize(filename) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    composer_checkpoint._write_checkpoint_file = cut


def die_while_assessing() -> None:
    """Die in the second forward pass of the first assessment."""
    opened = []

    def open_assessment(*arguments):
        opened.append(arguments)
        if len(opened) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    first_assessment.open_assessment = open_assessment


def deaths(die: str) -> list[Callback]:
    """Arrange for the death that was asked for."""
    how, _, batch = die.partition("-")
    if how == "save":
        die_while_saving(int(batch))
    elif how == "assess":
        die_while_assessing()
    elif how == "twice":
        preemption.REPEAT_SECONDS = 0
    elif how == "lost":
        return [Preempt(False, int(batch), signal.SIGKILL)]
    elif how in ("group", "one"):
        return [Preempt(how == "group", int(batch))]
    return [Die(SIGNALS[how], int(batch))] if how in SIGNALS else []


def make_model() -> HuggingFaceModel:
    return HuggingFaceModel(tiny_llama(kv_heads=2), tokenizer=None, use_logits=True)


def main(data: str, folder: str, die: str) -> None:
    model = make_model()
    dataset = StreamedTokens(
        local=data, shuffle=True, shuffle_seed=3, batch_size=4, num_canonical_nodes=1
    )
    apex = APEX(
        stages=["4ba", "3ba", "2ba"],
        threshold=0.25,
        kv_heads="expand",
        assessment={"tokens": 100},  # two batches
    )
    trainer = Trainer(
        model=model,
        train_dataloader=StreamingDataLoader(dataset, batch_size=4),
        optimizers=torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1),
        schedulers=StagewiseScheduler(stages=["4ba", "3ba", "2ba"]),
        max_duration="9ba",
        algorithms=[apex],
        callbacks=[preemption.Preemption(), *deaths(die)],
        device_train_microbatch_size=2,
        run_name="resume",
        save_folder=folder,
        save_interval="1ba",
        autoresume=True,
        seed=17,
        device="cpu",
        progress_bar=False,
    )
    began = trainer.state.timestamp.batch.value
    trainer.fit()
    weights = {name: t.clone() for name, t in model.model.state_dict().items()}
    end = {"began": began, "weights": weights, "history": apex.history}
    torch.save(end, os.path.join(folder, "end.pt"))
    trainer.close()


if __name__ == "__main__":
    own_names.install()
    data, *runs = sys.argv[1:]
    if len(runs) == 2:
        main(data, *runs)
    else:
        make_model()  # the first one imports all models of transformers
        pairs = zip(runs[::2], runs[1::2], strict=True)
        statuses = [exit_status(fork(main, data, *pair)) for pair in pairs]
        print(json.dumps(statuses))
