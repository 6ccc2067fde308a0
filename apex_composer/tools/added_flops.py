"""What APEX computes beside training, in the whole run that a YAML describes."""

import math
from dataclasses import dataclass
from typing import Any

from apex_composer.callbacks.start_checks import unit_tokens
from apex_composer.tools.model_size import count_shards
from apex_composer.tools.training_yaml import lay_out_stages


@dataclass(frozen=True)
class AddedFlops:
    """What APEX computes beside training in the whole run; see `operators/flops.py`.

    Attributes:
        fold: of the stages that have operators.
        gradient_map: of the same.
        norms: of the batches that are assessed.
        first_assessment: forward passes before the first stage.
    """

    fold: int
    gradient_map: int
    norms: int
    first_assessment: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.fold + self.gradient_map + self.norms + self.first_assessment


def count_added(plan: Any, apex: Any) -> AddedFlops:
    """All of a run.

    Args:
        plan: a `Plan` with its stages, model and cost.
        apex: the algorithm with the run's settings.
    """
    from apex_composer.trainer.first_assessment import first_goal

    expanded = sum(stage.tokens for stage in plan.stages if stage.expansion)
    steps = math.ceil(expanded / plan.step_tokens) * _copies(plan)
    assessed = 0
    if apex.method != "random":
        layout = lay_out_stages(apex.stages, plan.config["max_duration"])
        goal = first_goal(apex.tokens, layout)
        assessed = goal.total * unit_tokens(plan.config)[goal.unit]
    length = plan.config["max_seq_len"]
    read = plan.tokens // apex.interval + assessed if apex.method != "random" else 0
    return AddedFlops(
        plan.cost.fold_flops * steps,
        plan.cost.map_flops * steps,
        plan.cost.norm_flops * read,
        assessed * plan.forward.of_sequence(length) // length,
    )


def _copies(plan: Any) -> int:
    """How many times the operators' work of a step is done: shards share it, replicas do not."""
    return max(1, plan.gpus // count_shards(plan.config, plan.gpus))
