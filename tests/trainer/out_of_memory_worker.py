"""Two ranks of first assessments in which one runs out of memory: `test_out_of_memory.py`.

Usage: out_of_memory_worker.py OUT
"""

import sys
from pathlib import Path

import composer.trainer.trainer
import cpu_fsdp
import torch
from composer.core import Event
from composer.utils import dist
from forks import fork_ranks
from shards_worker import make_trainer
from test_out_of_memory import SmallMemory


def assess(mode: str, *, largest: int | None) -> dict:
    """The first stage's selection, and the microbatch that was found.

    Args:
        mode: of sharding.
        largest: microbatch that fits on the last rank, on the others all do; None for no `auto`.
    """
    # Before FSDP wraps: its modules then get Composer's hooks. Composer allows it on GPUs only.
    composer.trainer.trainer._is_auto_microbatching = lambda size, device: largest is not None
    trainer, apex, _ = make_trainer({"mode": mode})
    if largest is not None and dist.get_global_rank() == dist.get_world_size() - 1:
        model = getattr(trainer.state.model, "module", trainer.state.model)
        SmallMemory(largest, spared=1).on(model.model)
    trainer.engine.run_event(Event.FIT_START)
    record = apex.history[0]
    size = trainer.state.device_train_microbatch_size
    trainer.close()
    return {"size": size, "record": record}


def main(out: str) -> None:
    dist.initialize_dist("cpu")
    cpu_fsdp.patch()
    ends = {
        f"{mode}-{largest}": assess(mode, largest=largest)
        for mode in ("ddp", "fsdp1")
        for largest in (None, 1)
    }
    torch.save(ends, Path(out) / f"rank{dist.get_global_rank()}.pt")


if __name__ == "__main__":
    sys.exit(any(fork_ranks(2, main, *sys.argv[1:])))
