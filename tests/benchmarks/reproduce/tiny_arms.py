"""Arms on a model of two layers, 32 wide, that reads random tokens."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from reproduce.arms import Arm
from reproduce.model import BatchOrder, build_model, make_optimizer, train
from reproduce.scales import SCALES
from reproduce.variations import Varied
from torch import Tensor, nn

SCALE = SCALES["smoke"]
CPU = torch.device("cpu")
VOCABULARY = 64


@dataclass
class Started:
    """An arm before its first stage, and what was found of its stages."""

    arm: Arm
    model: nn.Module
    optimizer: torch.optim.Optimizer
    order: BatchOrder
    varied: Varied | None
    begun: list[dict[str, Any]] = field(default_factory=list)
    ended: list[dict[str, Any]] = field(default_factory=list)

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}


def in_double(model: nn.Module) -> nn.Module:
    """Float64 throughout: transformers' own norm computes in float32 whatever it is given."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            parent, _, child = name.rpartition(".")
            norm = nn.RMSNorm(len(module.weight), module.variance_epsilon)
            norm.weight = module.weight
            setattr(model.get_submodule(parent), child, norm)
    return model.double()


def start(arm: Arm, double: bool = False) -> Started:
    model = build_model(SCALE.sizes, VOCABULARY, CPU, seed=0)
    model = in_double(model) if double else model
    optimizer = make_optimizer(model)
    size = (64, SCALE.sizes.length + 1)
    windows = {"words": np.random.default_rng(0).integers(0, VOCABULARY, size).astype(np.uint16)}
    order = BatchOrder(windows, SCALE.batch, 1, CPU)
    varied = None if arm.apex is None else Varied(model, optimizer, arm, 1, order, SCALE)
    return Started(arm, model, optimizer, order, varied)


def train_stage(started: Started, stage: int, batches: int) -> None:
    """The first batches of a stage."""
    arm, varied = started.arm, started.varied
    first = 0 if stage == 0 else arm.stage_ends(SCALE)[stage - 1]
    if varied:
        started.begun.append(varied.begin(stage))
    train(
        started.model, started.optimizer, started.order, range(first, first + batches),
        lambda place: arm.learning_rate(SCALE, place),
        forward=varied.assessing if varied else nullcontext, clip=varied.clip if varied else None,
    )  # fmt: skip
    if varied:
        started.ended.append(varied.measure())


def run(arm: Arm, stages: int = 2, batches: int = 5) -> Started:
    """An arm trained for some stages."""
    started = start(arm)
    for stage in range(stages):
        train_stage(started, stage, batches)
    if started.varied:
        started.varied.end()
    return started


def equal(first: Started, second: Started) -> bool:
    """Whether all weights are the same, bit for bit."""
    own, other = first.weights(), second.weights()
    return all(torch.equal(own[name], other[name]) for name in own)
