"""One training run in a process of its own, which may kill itself: `test_resume.py` starts it.

Usage: resume_worker.py DATA FOLDER BATCH_TO_DIE_AT|none
"""

import os
import signal
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from composer import Callback, Trainer
from composer.models import HuggingFaceModel
from helpers import StreamedTokens, tiny_llama
from streaming import StreamingDataLoader

from apex_composer import APEX, StagewiseScheduler

torch.set_num_threads(1)


class Die(Callback):
    """SIGKILL at the end of a batch, before its checkpoint is written."""

    def __init__(self, batch: int | None):
        self.batch = batch

    def batch_end(self, state, logger):
        if state.timestamp.batch.value == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


def main(data: str, folder: str, die: str) -> None:
    model = HuggingFaceModel(tiny_llama(kv_heads=2), tokenizer=None, use_logits=True)
    dataset = StreamedTokens(
        local=data, shuffle=True, shuffle_seed=3, batch_size=4, num_canonical_nodes=1
    )
    apex = APEX(stages=["4ba", "3ba", "2ba"], threshold=0.25, kv_heads="expand")
    trainer = Trainer(
        model=model,
        train_dataloader=StreamingDataLoader(dataset, batch_size=4),
        optimizers=torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1),
        schedulers=StagewiseScheduler(stages=["4ba", "3ba", "2ba"]),
        max_duration="9ba",
        algorithms=[apex],
        callbacks=[Die(None if die == "none" else int(die))],
        device_train_microbatch_size=2,
        run_name="resume",
        save_folder=folder,
        save_interval="1ba",
        autoresume=True,
        seed=17,
        device="cpu",
        progress_bar=False,
    )
    trainer.fit()
    weights = {name: t.clone() for name, t in model.model.state_dict().items()}
    torch.save({"weights": weights, "history": apex.history}, os.path.join(folder, "end.pt"))
    trainer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
