"""Runs of the methods with every way of sharding: `test_sharded_methods.py` starts it.

Usage: methods_worker.py OUT RUNS
    OUT gets <name>-rank<rank>.pt of each run.
    RUNS: JSON, pairs of a number of ranks and the runs that they train one after the other,
        {"name", "method", "mode": plain | ddp | fsdp1 | fsdp2} and optionally "state_dict",
        "save", "load"; the mode "ties" compares masks instead.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Trainer
from composer.algorithms import GradientClipping
from composer.loggers import InMemoryLogger
from composer.models import HuggingFaceModel
from composer.utils import dist
from forks import fork_ranks
from helpers import TokenDataset, tiny_llama
from sharded_loop import ODD
from shards_worker import BATCH_SIZE, SAMPLES, cpu_fsdp, gathered, sharding
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.data import DataLoader
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from apex_composer.methods.act_regu import ActRegu
from apex_composer.methods.gmt import GMT, largest
from apex_composer.methods.gradient_masks import count_kept, gradient_parts
from apex_composer.methods.hft import HFT
from apex_composer.methods.rmt import RMT

METHODS = {
    "gmt": lambda: GMT(share=0.3),
    "rmt": lambda: RMT(share=0.3),
    "hft": lambda: HFT(),
    "act_regu": lambda: ActRegu(coefficient=3.0),
}


class Watch(Callback):
    """Which entries of the first batch's gradients are left."""

    def __init__(self):
        self.kept: dict[str, torch.Tensor] = {}

    def after_train_batch(self, state, logger):
        model = getattr(state.model, "module", state.model).model
        if state.timestamp.batch.value == 0:
            for name, parameter in model.named_parameters():
                gradient = parameter.grad
                if isinstance(gradient, DTensor):
                    gradient = gradient.full_tensor()
                if gradient is not None:
                    self.kept[name.replace("_checkpoint_wrapped_module.", "")] = gradient != 0


def make_trainer(run: dict[str, Any]) -> tuple[Trainer, Watch, InMemoryLogger]:
    """Six batches with clipping, microbatches of one sample, padding, checkpointed activations."""
    llama = tiny_llama(**ODD, dtype=torch.float64)
    model = HuggingFaceModel(llama, tokenizer=None, use_logits=True)
    llama.fsdp_wrap_fn = lambda module: isinstance(module, LlamaDecoderLayer)
    llama.activation_checkpointing_fn = lambda module: isinstance(module, LlamaDecoderLayer)
    dataset = TokenDataset(SAMPLES, padded=True)
    sampler = dist.get_sampler(dataset, shuffle=False, drop_last=False)
    watch, log = Watch(), InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(dataset, BATCH_SIZE // dist.get_world_size(), sampler=sampler),
        optimizers=torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1),
        max_duration="6ba",
        algorithms=[METHODS[run["method"]](), GradientClipping("norm", 0.5)],
        callbacks=[watch],
        loggers=[log],
        device_train_microbatch_size=1,
        parallelism_config=sharding(run["mode"], run.get("state_dict", "full")),
        save_folder=run.get("save"),
        save_interval="4ba",
        load_path=run.get("load"),
        device="cpu",
        seed=17,
        progress_bar=False,
    )
    return trainer, watch, log


def train(run: dict[str, Any]) -> dict[str, Any]:
    trainer, watch, log = make_trainer(run)
    model = trainer.state.model
    trainer.fit()
    weights = gathered(model)
    named = [(name, p.requires_grad) for name, p in model.named_parameters()]
    trainer.close()
    still = [name for name, p in model.named_parameters() if not p.requires_grad]
    frozen = [name for name, trained in named if not trained]
    penalties = [value for _, value in log.data.get("act_regu/penalty", [])]
    seen = {"kept": watch.kept, "penalties": penalties}
    return {"weights": weights, "frozen": frozen, "still": still, **seen}


def ties() -> dict[str, Any]:
    """Masks of sharded gradients with many ties, gathered, and those of the whole tensors."""
    torch.manual_seed(0)
    wholes = [torch.randn(shape).mul(2).round() for shape in ((7, 5), (1, 3), (9,), (64, 3))]
    mesh, placements = init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)]
    if dist.get_world_size() == 4:  # two replicas of two shards each
        mesh, placements = init_device_mesh("cpu", (2, 2)), [Replicate(), Shard(0)]
    model = nn.Module()
    for place, whole in enumerate(wholes):
        parameter = nn.Parameter(distribute_tensor(whole, mesh, placements))
        parameter.grad = distribute_tensor(whole, mesh, placements)
        model.register_parameter(f"p{place}", parameter)
    parts, found = gradient_parts(model), []
    counts = [count_kept(part.total, 0.6) for part in parts]
    masks = largest([part.gradient for part in parts], counts, parts[0].group)
    for part, mask, parameter in zip(parts, masks, model.parameters(), strict=True):
        part.gradient.copy_(mask)
        found.append(parameter.grad.full_tensor().bool())
    return {"found": found, "expected": [*largest(wholes, counts)], "counts": counts}


def one_rank(runs: list[dict], out: Path) -> None:
    dist.initialize_dist("cpu")
    cpu_fsdp.patch()
    for run in runs:
        end = ties() if run["mode"] == "ties" else train(run)
        torch.save(end, out / f"{run['name']}-rank{dist.get_global_rank()}.pt")


if __name__ == "__main__":
    for ranks, runs in json.loads(sys.argv[2]):
        if any(fork_ranks(ranks, one_rank, runs, Path(sys.argv[1]))):
            sys.exit("a rank has failed")
