"""One arm with one seed, from its base to its results."""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from reproduce.arms import AVERAGED, Arm, stops
from reproduce.bases import KINDS, Base, chosen
from reproduce.model import BatchOrder, build_model, evaluate, make_optimizer, train
from reproduce.scales import Scale
from reproduce.texts import Texts, windows
from reproduce.variations import Varied
from torch import Tensor, nn

Record = dict[str, Any]


def run_arm(
    arm: Arm,
    seed: int,
    scale: Scale,
    base: Base,
    texts: Texts,
    device: torch.device,
) -> list[Record]:
    """Train an arm from its base; its result, and that of the averaged checkpoints if it has one.

    Args:
        arm: what is done.
        seed: of the order of the data and of APEX.
        scale: its settings.
        base: what it goes on from.
        texts: what is read.
        device: where it runs.

    Returns:
        Records: `losses` per domain before the first batch and at the end of every stage, what
        was measured of operators in every stage, and seconds.

    Raises:
        FloatingPointError: where it diverged.
    """
    start = time.monotonic()
    model, optimizer = load_base(base, arm, scale, texts, device)
    kind = KINDS[base.name]
    order = BatchOrder(
        windows(chosen(texts, kind.continued), "continued", scale.sizes.length),
        scale.batch, seed, device,
    )  # fmt: skip
    held_out = windows(texts, "held_out", scale.sizes.length)
    varied = None if arm.apex is None else Varied(model, optimizer, arm, seed, order, scale)
    average = Average(model, averaged_places(arm, scale)) if arm.averaged else None
    losses = [evaluate(model, held_out, scale.at_once, device)]
    stages: list[dict[str, Any]] = []
    training_losses: list[float] = []
    place = 0
    for stage, end in enumerate(arm.stage_ends(scale)):
        facts = varied.begin(stage) if varied else {}
        forward = varied.assessing if varied else nullcontext
        clip = varied.clip if varied else None
        for stop in stops(place, end, average.places if average else ()):
            found = train(
                model, optimizer, order, range(place, stop),
                lambda number: arm.learning_rate(scale, number), forward=forward, clip=clip,
            )  # fmt: skip
            training_losses.append(float(found.mean()))
            if average is not None:
                average.add(stop)
            place = stop
        losses.append(evaluate(model, held_out, scale.at_once, device))
        facts |= varied.measure() if varied else {}
        stages.append(facts)
    if varied:
        varied.end()
    record = {
        "arm": arm.name, "seed": seed, "losses": losses, "stages": stages,
        "stage_ends": arm.stage_ends(scale), "training_losses": training_losses,
        "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip
    if average is None:
        return [record]
    average.load()
    averaged = {"losses": [losses[0], evaluate(model, held_out, scale.at_once, device)]}
    ends = {"stage_ends": [place], "averaged_batches": sorted(average.places)}
    # The run itself last: it counts as done once this line is whole.
    return [{**record, "arm": f"{arm.name}_averaged", **averaged, **ends, "stages": [{}]}, record]


def load_base(
    base: Base, arm: Arm, scale: Scale, texts: Texts, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The base's model and an optimizer, with its state or a fresh one."""
    model = build_model(scale.sizes, texts.vocabulary, device, seed=0)
    model.load_state_dict(base.model)
    optimizer = make_optimizer(model)
    if arm.keep_optimizer and base.optimizer is not None:
        # A copy: torch takes the tensors as they are and trains in them.
        optimizer.load_state_dict(deepcopy(base.optimizer))
    return model, optimizer


def averaged_places(arm: Arm, scale: Scale) -> set[int]:
    """Batches after which the averaged checkpoints are taken: evenly over the second half."""
    last = arm.stage_ends(scale)[-1]
    return {round(last / 2 + last / 2 * (i + 1) / AVERAGED) for i in range(AVERAGED)}


class Average:
    """The mean of a model's checkpoints.

    Args:
        model: that is trained.
        places: batches after which its weights count.
    """

    def __init__(self, model: nn.Module, places: set[int]):
        self._model, self.places = model, places
        self._sums: Mapping[str, Tensor] = {
            name: torch.zeros_like(value, dtype=torch.float64)
            for name, value in model.state_dict().items()
        }

    def add(self, place: int) -> None:
        """Count the weights as they are, if this is one of the places."""
        if place in self.places:
            for name, value in self._model.state_dict().items():
                self._sums[name] += value

    @torch.no_grad()
    def load(self) -> None:
        """Put the mean into the model."""
        for name, value in self._model.state_dict().items():
            value.copy_(self._sums[name] / len(self.places))
