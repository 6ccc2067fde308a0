"""One rank of runs with every way of sharding: `test_sharded_runs.py` starts it.

Usage: shards_worker.py RUNS OUT
    RUNS: a JSON list of {"name", "mode", "state_dict", "save", "load", "duration"}, all but the
    first two optional, trained one after the other; OUT gets <name>-rank<rank>.pt of each.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import cpu_fsdp
import torch
from composer import Callback, Trainer
from composer.algorithms import GradientClipping
from composer.models import HuggingFaceModel
from composer.utils import FSDP2Config, FSDPConfig, dist
from helpers import TokenDataset, tiny_llama
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from apex_composer import APEX, StagewiseScheduler

torch.set_num_threads(1)

# 3 batches an epoch; the last one is half full, and every sample but each fourth is padded.
BATCH_SIZE, SAMPLES = 8, 20
STAGES = ["3ba", "3ba"]


def sharding(mode: str, state_dict: str) -> dict[str, Any] | None:
    """Composer's `parallelism_config`."""
    # All weights in one group: a recomputation inside the backward pass would find them gone.
    common = {
        "activation_checkpointing": not mode.endswith("root"),
        "state_dict_type": state_dict,
    }
    if mode.startswith("fsdp1"):
        return {"fsdp": FSDPConfig(**common)}
    if mode.startswith("fsdp2"):
        return {"fsdp": FSDP2Config(**common)}
    if mode == "hsdp":
        degrees = {"data_parallel_shard_degree": 2, "data_parallel_replicate_degree": 2}
        return {"fsdp": FSDPConfig(sharding_strategy="HYBRID_SHARD", **degrees, **common)}
    assert mode in ("plain", "ddp"), mode
    return None


def odd_llama() -> torch.nn.Module:
    """Sizes that no number of ranks divides: shards are cut in rows, and some are empty."""
    return tiny_llama(hidden=22, channels=27, heads=4, kv_heads=2, head_dim=6)


class Operators(Callback):
    """What the last but one batch leaves: operators, their moments and their norms."""

    def __init__(self, apex: APEX):
        self.apex, self.seen = apex, {}

    def batch_end(self, state, logger):
        if state.timestamp.batch.value == 5:
            expander = self.apex._expander
            saved = expander.state_dict()
            self.seen = {"norms": expander.relative_norms()}
            self.seen |= {key: saved[key] for key in ("factors", "moments", "scores")}


def make_trainer(run: dict[str, Any]) -> tuple[Trainer, APEX]:
    """A run of two stages with clipping, microbatches and checkpointed activations."""
    model = HuggingFaceModel(odd_llama(), tokenizer=None, use_logits=True)
    if not run["mode"].endswith("root"):
        model.model.fsdp_wrap_fn = lambda module: isinstance(module, LlamaDecoderLayer)
    model.model.activation_checkpointing_fn = lambda m: isinstance(m, LlamaDecoderLayer)
    dataset = TokenDataset(SAMPLES, padded=True)
    sampler = dist.get_sampler(dataset, shuffle=False, drop_last=False)
    loader = DataLoader(dataset, BATCH_SIZE // dist.get_world_size(), sampler=sampler)
    apex = APEX(stages=STAGES, threshold=0.25, kv_heads="expand", assessment={"tokens": 60})
    trainer = Trainer(
        model=model,
        train_dataloader=loader,
        optimizers=torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1),
        schedulers=StagewiseScheduler(stages=STAGES, lr_multipliers=[1.0, 0.5]),
        max_duration="6ba",
        algorithms=[apex, GradientClipping("norm", 0.5)],
        callbacks=[Operators(apex)],
        device_train_microbatch_size=1,
        parallelism_config=sharding(run["mode"], run.get("state_dict", "full")),
        save_folder=run.get("save"),
        save_interval="4ba",
        load_path=run.get("load"),
        device="cpu",
        seed=17,
        progress_bar=False,
    )
    return trainer, apex


def train(run: dict[str, Any], out: Path) -> None:
    """One run; every rank leaves its whole weights, history, operators and scores."""
    trainer, apex = make_trainer(run)
    trainer.fit(duration=run.get("duration"))
    operators = next(c for c in trainer.state.callbacks if isinstance(c, Operators)).seen
    model = getattr(trainer.state.model, "module", trainer.state.model)
    weights = get_model_state_dict(model.model, options=StateDictOptions(full_state_dict=True))
    end = {
        "weights": {name: tensor.clone() for name, tensor in weights.items()},
        "history": apex.history,
        "operators": operators,
    }
    torch.save(end, out / f"{run['name']}-rank{dist.get_global_rank()}.pt")
    trainer.close()


def main(runs: str, out: str) -> None:
    dist.initialize_dist("cpu")
    cpu_fsdp.patch()
    for run in json.loads(runs):
        train(run, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
