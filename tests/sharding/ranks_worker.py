"""One rank of a data-parallel run: `test_ranks.py` starts it under `composer -n 2`.

Usage: ranks_worker.py FOLDER
"""

import os
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from composer.utils import dist
from composer_run import BATCH_SIZE, make_trainer
from helpers import TokenDataset, tiny_llama
from torch.utils.data import DataLoader

from apex_composer import APEX

torch.set_num_threads(1)


def train(folder: str) -> None:
    """Six batches in two stages; every rank leaves its weights, history and scores."""
    dist.initialize_dist("cpu")
    dataset = TokenDataset(8 * BATCH_SIZE, padded=True)
    sampler = dist.get_sampler(dataset, shuffle=False, drop_last=True)
    size = BATCH_SIZE // dist.get_world_size()
    apex = APEX(stages=2, threshold=0.25, assessment={"tokens": 40})
    trainer = make_trainer(
        apex,
        # Ranks add gradients up in another order: in float32 AdamW would make whole steps of it.
        model=tiny_llama(dtype=torch.float64),
        loader=DataLoader(dataset, batch_size=size, sampler=sampler),
        microbatch=1,
    )
    trainer.fit()
    model = trainer.state.model
    model = getattr(model, "module", model)
    end = {
        "weights": dict(model.model.state_dict()),
        "history": apex.history,
        "scores": apex._expander.state_dict()["scores"],
    }
    torch.save(end, os.path.join(folder, f"rank{dist.get_global_rank()}.pt"))
    trainer.close()


if __name__ == "__main__":
    train(sys.argv[1])
