"""SIGTERM in the processes that load data: theirs to survive until the training process is done."""

import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any


def shelter_workers(dataloader: Any) -> None:
    """Let a DataLoader's workers outlive a SIGTERM that the cluster sends to all processes.

    A dying worker would raise an error in the training process before it has saved. The training
    process itself can still end them.

    Args:
        dataloader: torch's, before it starts workers; anything else is left alone.
    """
    if getattr(dataloader, "num_workers", 0) and hasattr(dataloader, "worker_init_fn"):
        before = dataloader.worker_init_fn
        if not (isinstance(before, partial) and before.func is _shelter):
            dataloader.worker_init_fn = partial(_shelter, before)


def _shelter(before: Callable[[int], None] | None, worker: int) -> None:
    # Blocked, SIGTERM waits for sigwaitinfo, which unlike a handler says who has sent it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_the_parent, daemon=True).start()
    if before is not None:
        before(worker)


def _obey_the_parent() -> None:
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if sender == os.getppid():
            os._exit(0)
