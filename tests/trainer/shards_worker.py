"""Runs with every way of sharding: `test_sharded_runs.py` starts it.

Usage: shards_worker.py OUT RUNS
    OUT gets <name>-rank<rank>.pt of each run.
    RUNS: JSON, pairs of a number of ranks and the runs that they train one after the other,
        {"name", "mode": plain | ddp | fsdp1 | fsdp2 | hsdp1 | loop_hsdp2 | fsdp1_root |
        fsdp2_root} and optionally "state_dict", "save", "load", "fails", "tampered", "logged" (the
        folder of `local_metrics`, with evaluations) and more "settings" of apex.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("TRITON_INTERPRET", "1")

import cpu_fsdp
import torch
from composer import Callback, Evaluator, Trainer
from composer.algorithms import GradientClipping
from composer.callbacks import SpeedMonitor
from composer.metrics import LanguageCrossEntropy
from composer.models import HuggingFaceModel
from composer.utils import FSDP2Config, FSDPConfig, dist
from forks import fork_ranks
from helpers import TokenDataset, tiny_llama
from sharded_loop import ODD, own_shards, train_loop, whole_weights
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial
from torch.utils.data import DataLoader
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from apex_composer import APEX, StagewiseScheduler
from apex_composer.assessment import selection
from apex_composer.callbacks.local_metrics import LocalMetrics
from apex_composer.callbacks.start_guard import StartGuard

torch.set_num_threads(1)

# 3 batches an epoch; the last one is half full, and every sample but each fourth is padded.
BATCH_SIZE, SAMPLES = 8, 20
STAGES = ["3ba", "3ba"]


class Watch(Callback):
    """What the last but one batch leaves: operators, norms and shards."""

    def __init__(self, apex: APEX):
        self.apex, self.seen = apex, {}

    def batch_end(self, state, logger):
        if state.timestamp.batch.value == 5:
            own = self.apex._expander
            self.seen = {"norms": own.relative_norms(), "shards": own_shards(own)}
            self.seen["whole"] = gathered(state.model)
            self.seen["state"] = own.state_dict()
            model = getattr(state.model, "module", state.model)
            self.seen["flops"] = model.flops_per_batch(state.batch)


class FailedStep(Callback):
    """A step that stops half-way, then a forward pass that gathers the unfolded weights."""

    def __init__(self, apex: APEX):
        self.apex, self.losses = apex, []

    @torch.no_grad()
    def batch_end(self, state, logger):
        if state.timestamp.batch.value != 4:
            return
        own = self.apex._expander
        for site in own.sites:  # the batch's step has mapped them; a step of their own begins
            for gradient in (parameter.grad for parameter in site.parameters()):
                if gradient is not None:  # shards may be empty
                    gradient.mul_(1)
        for act in (own.running.before_step, own.ensure_folded):
            act()
            self.losses.append(float(state.model(state.batch).loss))


class SpreadNumber(Callback):
    """Logs a number of which each rank has a part."""

    def batch_end(self, state, logger):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        part = torch.tensor(1.0 + dist.get_global_rank())
        logger.log_metrics({"spread": DTensor.from_local(part, mesh, [Partial()])})


def logging(run: dict[str, Any], dataset: TokenDataset) -> dict[str, Any]:
    """The trainer's options for a run that is evaluated and logged."""
    if "logged" not in run:
        return {}
    sampler = dist.get_sampler(dataset, shuffle=False, drop_last=False)
    loader = DataLoader(dataset, 2, sampler=sampler)
    evaluator = Evaluator(label="eval/cc", dataloader=loader, metric_names=["LanguageCrossEntropy"])
    logger = LocalMetrics(run["logged"])
    return {"eval_dataloader": evaluator, "eval_interval": "3ba", "loggers": [logger]}


def gathered(model: HuggingFaceModel) -> dict[str, torch.Tensor]:
    """All weights of the model inside of Composer's, which DDP may have wrapped."""
    return whole_weights(getattr(model, "module", model).model)


def sharding(mode: str, state_dict: str) -> dict[str, Any] | None:
    """Composer's `parallelism_config`."""
    # All weights in one group: a recomputation inside the backward pass would find them gone.
    common = {
        "activation_checkpointing": not mode.endswith("root"),
        "state_dict_type": state_dict,
        "mixed_precision": "FULL",  # that of the model: float64
    }
    if mode.startswith("fsdp1"):
        strategy = "SHARD_GRAD_OP" if mode.endswith("root") else "FULL_SHARD"
        return {"fsdp": FSDPConfig(sharding_strategy=strategy, **common)}
    if mode.startswith("fsdp2"):
        # Kept gathered between forward and backward in the root case.
        return {"fsdp": FSDP2Config(reshard_after_forward=not mode.endswith("root"), **common)}
    if mode == "hsdp1":
        degrees = {"data_parallel_shard_degree": 2, "data_parallel_replicate_degree": 2}
        return {"fsdp": FSDPConfig(sharding_strategy="HYBRID_SHARD", **degrees, **common)}
    assert mode in ("plain", "ddp"), mode
    return None


def make_trainer(run: dict[str, Any]) -> tuple[Trainer, APEX, list[Callback]]:
    """A run of two stages with clipping, microbatches and checkpointed activations."""
    # Ranks add gradients up in another order: in float32 AdamW would make whole steps of it.
    llama = tiny_llama(**ODD, dtype=torch.float64)
    metrics = [LanguageCrossEntropy()] if "logged" in run else None
    model = HuggingFaceModel(llama, tokenizer=None, use_logits=True, eval_metrics=metrics)
    if not run["mode"].endswith("root"):
        llama.fsdp_wrap_fn = lambda module: isinstance(module, LlamaDecoderLayer)
    llama.activation_checkpointing_fn = lambda module: isinstance(module, LlamaDecoderLayer)
    dataset = TokenDataset(SAMPLES, padded=True)
    sampler = dist.get_sampler(dataset, shuffle=False, drop_last=False)
    loader = DataLoader(dataset, BATCH_SIZE // dist.get_world_size(), sampler=sampler)
    apex = APEX(
        stages=STAGES,
        threshold=0.25,
        kv_heads="expand",
        assessment={"tokens": 60},
        operator_lr_scale=3.0,
        **run.get("settings", {}),
    )
    callbacks = [Watch(apex), SpeedMonitor(), StartGuard()]
    callbacks += [FailedStep(apex)] * run.get("fails", False)
    callbacks += [SpreadNumber()] * ("logged" in run)
    trainer = Trainer(
        model=model,
        train_dataloader=loader,
        optimizers=torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1),
        schedulers=StagewiseScheduler(stages=STAGES, lr_multipliers=[1.0, 0.5]),
        max_duration="6ba",
        algorithms=[apex, GradientClipping("norm", 0.5)],
        callbacks=callbacks,
        device_train_microbatch_size=1,
        parallelism_config=sharding(run["mode"], run.get("state_dict", "full")),
        save_folder=run.get("save"),
        save_interval="4ba",
        load_path=run.get("load"),
        device="cpu",
        seed=17,
        progress_bar=False,
        **logging(run, dataset),
    )
    return trainer, apex, callbacks


def train(run: dict[str, Any]) -> dict[str, Any]:
    """Both stages; every rank's view of the weights, the history and the last steps."""
    trainer, apex, (watch, *others) = make_trainer(run)
    model = trainer.state.model
    if run.get("evaluated"):  # FSDP2 then shows other parameters of what no layer has, at fit()
        evaluate(model)
    trainer.fit()
    weights = gathered(model)
    if run.get("evaluated"):
        evaluate(model)
    trainer.close()
    losses = [own.losses for own in others if isinstance(own, FailedStep)]
    end = {"weights": weights, "history": apex.history, "losses": losses, **watch.seen}
    if run["mode"] == "fsdp2":
        model.model.reshard()
        end["frozen"] = [name for name, p in model.named_parameters() if not p.requires_grad]
    return end


def evaluate(model: HuggingFaceModel) -> None:
    """A forward pass that nobody trains on."""
    with torch.no_grad():
        model({"input_ids": torch.zeros(1, 4, dtype=torch.long)})


def tampered(run: dict[str, Any]) -> dict[str, Any]:
    """Rank 1 selects other units than the others do."""
    select = selection.select
    flip = -1 if dist.get_global_rank() == 1 else 1
    trainer, _, _ = make_trainer(run)
    with patch.object(selection, "select", lambda scores, count: select(flip * scores, count)):
        try:
            trainer.fit()
        except RuntimeError as error:
            return {"error": str(error)}
        finally:
            trainer.close()
    return {"error": None}


def loop_hsdp2(run: dict[str, Any]) -> dict[str, Any]:
    """Two replicas of two shards each, without a trainer."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return train_loop(tiny_llama(**ODD, dtype=torch.float64), mesh)


def one_rank(runs: list[dict], out: Path) -> None:
    dist.initialize_dist("cpu")
    cpu_fsdp.patch()
    for run in runs:
        act = loop_hsdp2 if run["mode"] == "loop_hsdp2" else train
        end = tampered(run) if run.get("tampered") else act(run)
        torch.save(end, out / f"{run['name']}-rank{dist.get_global_rank()}.pt")


if __name__ == "__main__":
    for ranks, runs in json.loads(sys.argv[2]):
        if any(fork_ranks(ranks, one_rank, runs, Path(sys.argv[1]))):
            sys.exit("a rank has failed")
