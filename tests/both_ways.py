"""The same training by the package and by autograd through W_eff: two stages of four batches."""

import copy

import torch
from helpers import CHANGE_BOUND, SMOOTH_EPS, change_error, cross_entropy, factors_now, tokens
from oracle import Oracle
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from apex_composer import Expander, find_sites

LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.95), 1e-8, 0.1
BATCHES, BATCH_SIZE, MICROBATCHES, STAGE = 8, 4, 2, 4
LRS = [LR] * STAGE + [0.4 * LR] * STAGE


def eps_of(model: nn.Module) -> float:
    """Adam's: in float32 one that keeps rounding from deciding the direction of a step."""
    return SMOOTH_EPS if next(model.parameters()).dtype == torch.float32 else EPS


def make_adamw(model: nn.Module) -> AdamW:
    return AdamW(model.parameters(), LR, betas=BETAS, eps=eps_of(model), weight_decay=DECAY)


def microbatches(batch: int) -> tuple[Tensor, ...]:
    """The token ids of one batch."""
    return tokens(BATCHES * BATCH_SIZE).split(BATCH_SIZE)[batch].chunk(MICROBATCHES)


def train_in_a_loop(model: nn.Module, clip: float | None) -> tuple[list[float], dict]:
    """By the package; every batch's loss, and the operators that each stage began with."""
    expander = Expander(find_sites(model), threshold=0.25, kv_heads="expand")
    with torch.no_grad(), expander.assessing():
        model(input_ids=tokens(8, seed=1))
    optimizer = make_adamw(model)
    expander.attach(optimizer)
    losses, stages = [], {}
    for batch in range(BATCHES):
        if batch % STAGE == 0:
            expander.begin_stage()
            stages[batch] = factors_now(expander)
        optimizer.param_groups[0]["lr"] = LRS[batch]
        optimizer.zero_grad()
        losses.append(0.0)
        for part in microbatches(batch):
            with expander.assessing():
                logits = model(input_ids=part).logits
            loss = cross_entropy(logits, part) / MICROBATCHES
            loss.backward()
            losses[-1] += loss.item()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    expander.fuse()
    return losses, stages


def train_by_autograd(
    model: nn.Module, optimizer: Optimizer, clip: float | None, stages: dict, lrs: list[float]
) -> list[float]:
    """By the oracle, given the operators' starting points and the learning rates; the losses."""
    oracle = Oracle(model, optimizer, BETAS, eps_of(model))
    losses = []
    for batch in range(BATCHES):
        if batch in stages:
            oracle.begin_stage(stages[batch])
        parts = [
            lambda call, part=part: cross_entropy(call(input_ids=part).logits, part)
            for part in microbatches(batch)
        ]
        losses.append(oracle.step(parts, lrs[batch], clip, microbatches=MICROBATCHES))
    oracle.fuse()
    return losses


def check_weights(weights: dict, expected: dict, start: dict, tolerance: float) -> None:
    """Two trainings from the same start end at the same weights but for rounding."""
    for name, weight in weights.items():
        wanted = expected[name]
        if weight.dtype == torch.float32:
            assert change_error(weight, wanted, start[name]) < CHANGE_BOUND, name
        else:
            assert (weight - wanted).abs().max() <= tolerance * wanted.abs().max(), name
    # The comparison means something only if training moved the weights by far more.
    moved = max(float((expected[n] - w).abs().max() / w.abs().max()) for n, w in start.items())
    assert moved > 1000 * tolerance


def compare(model: nn.Module, clip: float | None = None, tolerance: float = 1e-10) -> dict:
    """Train a model both ways; the operators that each stage began with."""
    twin, start = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    losses, stages = train_in_a_loop(model, clip)
    expected = train_by_autograd(twin, make_adamw(twin), clip, stages, LRS)
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=0)
    check_weights(model.state_dict(), twin.state_dict(), start, tolerance)
    return stages
