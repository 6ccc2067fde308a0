"""The runs of a campaign, in this process or in several: one that fails ends no other."""

import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import now, progress_bar
from reproduce.arms import Arm
from reproduce.bases import Base, get_base
from reproduce.continued import run_arm
from reproduce.records import Record, append, as_json, diverged_file, protocol
from reproduce.scales import Scale
from reproduce.texts import Texts, load


class Job(NamedTuple):
    """One run that is still to be done."""

    arm: Arm
    seed: int


class Settings(NamedTuple):
    """What all runs of a campaign share.

    Attributes:
        scale: its settings.
        texts: folder of the prepared text.
        folder: of bases.
        facts: of the machine and the command.
        deadline: moment of `time.monotonic` after which no run is begun; None begins all.
    """

    scale: Scale
    texts: Path
    folder: Path
    facts: dict[str, Any]
    deadline: float | None = None

    @property
    def late(self) -> bool:
        """Whether no run may begin any more."""
        return self.deadline is not None and time.monotonic() > self.deadline


class Ended(NamedTuple):
    """How a run ended: with records, one of which says so where it diverged, or with an error."""

    job: Job
    records: list[Record]
    error: Exception | None = None


def run_job(job: Job, settings: Settings) -> list[Record]:
    """One run in this process: its results; or one record of where it diverged."""
    scale = settings.scale
    texts, base = _loaded(job.arm.base, scale, settings.texts, settings.folder)
    common = {
        "texts": texts.hash, "base": base.hash, "base_batches": base.batches,
        "scale": protocol(scale), "settings": job.arm.facts(), "study": job.arm.study,
        "arm": job.arm.name, "seed": job.seed, **settings.facts,
    }  # fmt: skip
    try:
        found = run_arm(job.arm, job.seed, scale, base, texts, torch.device(scale.device))
    except FloatingPointError as error:
        found = [{"diverged": str(error)}]
    return [as_json({**common, "date": now(), **record}) for record in found]


@lru_cache(maxsize=1)
def _loaded(name: str, scale: Scale, texts_folder: Path, folder: Path) -> tuple[Texts, Base]:
    """Both, read and hashed once for many runs."""
    texts = load(texts_folder)
    return texts, get_base(name, scale, texts, folder, torch.device(scale.device))


def run_jobs(jobs: Sequence[Job], settings: Settings, out: Path) -> int:
    """Run all jobs, each result written as it comes; the number of those that gave none.

    What diverged is written beside the results, and would diverge again. Any other error is
    printed, and its run is done again by the next campaign.

    Args:
        jobs: in the order in which they are begun.
        settings: what they share.
        out: file of results.
    """
    scale, given = settings.scale, 0
    total = sum(job.arm.stage_ends(scale)[-1] for job in jobs)
    with progress_bar(None, total=total, desc=f"runs of {scale.name}", unit="batch") as bar:
        for job, records, error in _ended(jobs, settings):
            name = f"{job.arm.name} {job.seed}"
            if error is None:
                given += 1
                diverged = any("diverged" in record for record in records)
                append(diverged_file(out) if diverged else out, records)
            else:
                traceback.print_exception(error)
                print(f"{name} failed: {error!r}", file=sys.stderr)
            bar.set_postfix_str(name, refresh=False)
            bar.update(job.arm.stage_ends(scale)[-1])
    return len(jobs) - given


def _ended(jobs: Sequence[Job], settings: Settings) -> Iterator[Ended]:
    if settings.scale.workers > 1:
        yield from _ended_in_workers(jobs, settings)
        return
    for job in jobs:
        if settings.late:
            return
        try:
            ended = Ended(job, run_job(job, settings))
        except Exception as error:
            ended = Ended(job, [], error)
        yield ended


def _ended_in_workers(jobs: Sequence[Job], settings: Settings) -> Iterator[Ended]:
    waiting, running = list(jobs), dict[Future, Job]()
    context, workers = multiprocessing.get_context("spawn"), settings.scale.workers
    with ProcessPoolExecutor(workers, context, _begin_worker) as pool:
        try:
            while True:
                while waiting and len(running) < workers and not settings.late:
                    job = waiting.pop(0)
                    running[pool.submit(run_job, job, settings)] = job
                if not running:
                    return
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                # Results before errors, of which one may end the campaign.
                for future in sorted(finished, key=lambda one: one.exception() is not None):
                    yield _result(future, running)
        except BaseException:  # an interrupt, a full disk: runs of many minutes are not waited for
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _result(future: Future, running: dict[Future, Job]) -> Ended:
    """Of a future, which leaves `running`.

    Raises:
        SystemExit: where a worker was killed, after which there are none.
    """
    error = future.exception()
    if isinstance(error, BrokenExecutor):
        names = " and ".join(f"{job.arm.name} {job.seed}" for job in running.values())
        raise SystemExit(
            f"a worker was killed, by the system where memory ran out, while {names} ran. All "
            "results before are kept: run the same command again"
        )
    job = running.pop(future)
    return Ended(job, [] if error else future.result(), error)


def _begin_worker() -> None:
    """One thread for each run; and no worker outlives a campaign that was killed."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_campaign, daemon=True).start()


def _end_with_campaign() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
