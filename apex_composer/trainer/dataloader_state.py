"""Iterate a training dataloader without changing what training will see afterwards."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch

from apex_composer.distributed import barrier


@contextmanager
def undisturbed(dataloader: Any) -> Iterator[None]:
    """Put back every random state, epoch counter and worker that iterating the loader moves.

    Works for torch DataLoaders (any sampler, own generators, persistent workers, collators that
    keep numbers or lists between batches) and for StreamingDataset behind them. It holds before
    the loader's first batch of a run only (at FIT_START, fresh or resumed), never in the middle
    of an epoch.

    Every rank must enter, and must call `iter()` equally often: StreamingDataset has a barrier.

    Args:
        dataloader: what training iterates.
    """
    dataset, sampler = getattr(dataloader, "dataset", None), getattr(dataloader, "sampler", None)
    numpy_state, python_state = np.random.get_state(), random.getstate()
    generators = [(g, g.get_state()) for g in _generators(dataloader)]
    collate_state = _collate_state(dataloader)
    sampler_epoch = getattr(sampler, "epoch", None)
    # StreamingDataset counts epochs in memory shared by the node's ranks and workers.
    streaming_epoch = getattr(dataset, "next_epoch", None)
    yielded = getattr(dataloader, "num_samples_yielded", None)
    had_workers = getattr(dataloader, "_iterator", None) is not None
    if streaming_epoch is not None:
        barrier()  # nobody iterates before all have read the counter
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        _stop_workers(dataloader, had_workers)
        if streaming_epoch is not None:
            barrier()  # all have stopped iterating
            dataset.next_epoch = streaming_epoch
            barrier()
        if yielded is not None:
            dataloader.num_samples_yielded = yielded
        if sampler_epoch is not None:
            sampler.set_epoch(sampler_epoch)
        if collate_state:
            vars(dataloader.collate_fn).update(collate_state)
        for generator, state in generators:
            generator.set_state(state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def _generators(dataloader: Any) -> list[torch.Generator]:
    """The generators of the loader and its samplers, each once."""
    batch_sampler = getattr(dataloader, "batch_sampler", None)
    owners = (
        dataloader,
        getattr(dataloader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    found = {id(g): g for g in (getattr(owner, "generator", None) for owner in owners)}
    return [g for g in found.values() if isinstance(g, torch.Generator)]


def _collate_state(dataloader: Any) -> dict[str, Any]:
    """Copies of what a collator object keeps between batches (packing keeps leftovers)."""
    attributes = getattr(getattr(dataloader, "collate_fn", None), "__dict__", {})
    kept = int | float | list | dict | set | tuple
    return {name: deepcopy(value) for name, value in attributes.items() if isinstance(value, kept)}


def _stop_workers(dataloader: Any, had_workers: bool) -> None:
    """End persistent workers that were started inside.

    Otherwise the next iter() would only reset them and draw one random number fewer.
    """
    iterator = getattr(dataloader, "_iterator", None)
    if iterator is not None and not had_workers:
        iterator._shutdown_workers()
        dataloader._iterator = None
