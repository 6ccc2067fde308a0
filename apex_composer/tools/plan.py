"""What a training YAML will do, in numbers, without training: `apex-composer plan`."""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from apex_composer.callbacks.adapter_checks import check_adapters
from apex_composer.callbacks.finetuning_checks import check_examples, check_packing
from apex_composer.callbacks.start_checks import (
    Checkpoints,
    check_batches,
    check_context,
    check_disk,
    count_checkpoints,
    unit_tokens,
    weight_bytes,
)
from apex_composer.tools.added_flops import AddedFlops, count_added
from apex_composer.tools.model_size import Cost, build_shapes, estimate_cost, find_trained
from apex_composer.tools.training_yaml import (
    Settings,
    build_methods,
    check_names,
    lay_out_stages,
    local_save_folder,
    stream_folders,
)

if TYPE_CHECKING:
    from apex_composer.model.flops import Flops


@dataclass(frozen=True)
class StageRow:
    """One stage: where it ends (time unit as given), its tokens, learning rates and operators.

    Of the learning rate: from its start to its end the values between which it moves; none where
    only the scheduler's name is known.
    """

    end: str
    tokens: int
    learning_rates: tuple[float, ...]
    expansion: bool


@dataclass
class Plan:
    """All that `make_plan` found; what is None could not be found out, and `problems` say why."""

    config: Settings
    gpus: int
    problems: list[str] = field(default_factory=list)
    stages: list[StageRow] = field(default_factory=list)
    parameters: int | None = None
    trained: int | None = None
    flops: "Flops | None" = None  # of training
    forward: "Flops | None" = None
    no_flops: str | None = None  # why they are not known
    added: AddedFlops | None = None
    cost: Cost | None = None
    checkpoints: Checkpoints | None = None
    data_tokens: int | None = None

    @property
    def step_flops(self) -> int | None:
        """Of forward and backward pass for one batch; see `model/flops.py`."""
        if self.flops is None:
            return None
        batch = self.config["global_train_batch_size"]
        return batch * self.flops.of_sequence(self.config["max_seq_len"])

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def step_tokens(self) -> int:
        """Of one batch, over all GPUs."""
        return unit_tokens(self.config)["ba"]

    def attempt(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function; what it refuses becomes a problem, and the result None."""
        try:
            return function(*arguments)
        except (ValueError, TypeError, KeyError, OSError) as error:
            missing = f"{error} is missing in the YAML" if isinstance(error, KeyError) else None
            self.problems.append(missing or str(error))
            return None


def make_plan(config: Settings, gpus: int) -> Plan:
    """Check a configuration as far as that goes without data and weights, and count.

    Args:
        config: configuration of `load_configuration`.
        gpus: ranks of the run.
    """
    plan = Plan(config, gpus)
    plan.problems += list(check_names(config))
    if plan.problems:  # everything below would only repeat them
        return plan
    microbatch = config.get("device_train_microbatch_size", "auto")
    plan.attempt(check_batches, config["global_train_batch_size"], gpus, microbatch)
    plan.attempt(check_packing, config)
    plan.attempt(check_examples, config)
    plan.attempt(check_adapters, config)
    methods = plan.attempt(build_methods, config.get("algorithms")) or {}
    plan.stages = plan.attempt(_lay_out, config, methods.get("apex")) or []
    model = plan.attempt(build_shapes, config)
    if model is not None:
        _count_model(plan, model, methods)
    plan.data_tokens = plan.attempt(count_data, config)
    return plan


def _lay_out(config: Settings, algorithm: Any) -> list[StageRow]:
    """Stages of the algorithm and the scheduler, which must agree; else the run as one stage."""
    from apex_composer.trainer.scheduler import StagewiseScheduler
    from apex_composer.trainer.wsd import WSDScheduler

    known = {"stagewise": StagewiseScheduler, "wsd": WSDScheduler}
    settings = dict(config["scheduler"])
    kind = known.get(settings.pop("name"))
    scheduler = None if kind is None else kind(**settings)
    stagewise = scheduler if kind is StagewiseScheduler else None
    duration, owner = config["max_duration"], algorithm or stagewise
    layout = lay_out_stages(owner.stages if owner else 1, duration)
    if layout is None:
        return []
    if stagewise is not None and algorithm is not None:
        other = lay_out_stages(stagewise.stages, duration)
        if other is None or other.ends != layout.ends:
            raise ValueError(
                f"stages: the scheduler stagewise ends them at "
                f"{other.describe() if other else stagewise.stages}, the algorithm apex at "
                f"{layout.describe()}: give both the same stages"
            )
    moves = [()] * len(layout.ends)
    if stagewise is not None:
        moves = [(multiplier,) for multiplier in stagewise.lr_multipliers]
    elif scheduler is not None:
        moves = _wsd_moves(scheduler, duration, layout)
    unit, rows = layout.unit, []
    stages = zip(layout.starts(), layout.ends, layout.expansion, moves, strict=True)
    for start, end, expansion, multipliers in stages:
        rates = tuple(config["optimizer"]["lr"] * multiplier for multiplier in multipliers)
        tokens = (end - start) * unit_tokens(config)[unit]
        expansion = algorithm is not None and algorithm.expansion and expansion
        rows.append(StageRow(f"{end:,}{unit}", tokens, rates, expansion))
    return rows


def _wsd_moves(scheduler: Any, duration: int | str, layout: Any) -> list[tuple[float, ...]]:
    """Of every stage, what a `wsd` multiplies by at its start, at seams within it, at its end."""
    from composer.core import TimeUnit, ensure_time

    given = (scheduler.t_warmup, scheduler.t_decay, scheduler.t_cycle)
    if TimeUnit.EPOCH in [time.unit for time in given if time is not None]:
        return [()] * len(layout.ends)  # only the data tells
    total = ensure_time(duration, TimeUnit.EPOCH)
    spans = scheduler.spans(SimpleNamespace(max_duration=total, dataloader_len=None))
    found = []
    for start, end in zip(layout.starts(), layout.ends, strict=True):
        values = [scheduler.multiplier(start, spans)]
        for seam in [*(seam for seam in spans.seams() if start < seam < end), end]:
            cycle_over = seam % spans.cycle == 0
            values += [scheduler.alpha_f] if cycle_over else []
            values += [] if cycle_over and seam == end else [scheduler.multiplier(seam, spans)]
        found.append(tuple(value for value, _ in groupby(values)))
    return found


def _count_model(plan: Plan, model: Any, methods: Settings) -> None:
    plan.parameters = sum(parameter.numel() for parameter in model.parameters())
    plan.attempt(check_context, plan.config["max_seq_len"], model.config)
    algorithm = methods.get("apex") or methods.get("s2ft")
    if algorithm is not None:
        plan.cost = plan.attempt(estimate_cost, model, algorithm)
    trained = _find_trained(plan, model, methods.get("hft"))
    if trained is not None:
        _count_flops(plan, model, trained, methods.get("apex"))
    if plan.config.get("save_folder") is not None and plan.trained is not None:
        _count_checkpoints(plan)
        folder = local_save_folder(plan.config)
        if plan.checkpoints is not None and folder is not None:
            plan.attempt(check_disk, folder, plan.checkpoints)


def _find_trained(plan: Plan, model: Any, hft: Any) -> Collection[str] | None:
    """Names of what has gradients; how many of its numbers are trained goes into the plan."""
    if plan.cost is not None and plan.cost.share is not None:
        plan.trained = plan.cost.share.trained
        return plan.cost.trained
    found = plan.attempt(find_trained, model, hft, plan.config.get("seed", 17))  # its default
    plan.trained = None if found is None else sum(found.values())
    return found


def _count_flops(plan: Plan, model: Any, trained: Collection[str], apex: Any) -> None:
    from apex_composer.model.flops import forward_flops
    from apex_composer.model.trained_parts import find_roles

    try:
        roles = find_roles(model)
    except ValueError as error:  # it trains all the same
        plan.no_flops = str(error)
        return
    plan.flops, plan.forward = roles.flops(trained), forward_flops(roles.config)
    if apex is not None and plan.cost is not None and plan.stages:
        plan.added = count_added(plan, apex)


def _count_checkpoints(plan: Plan) -> None:
    rows = plan.cost is not None and plan.cost.share is not None
    model = plan.config["model"]
    adapters = model.get("peft_config") and model.get("should_save_peft_only", True)
    sizes = plan.trained if adapters else plan.parameters, plan.trained, weight_bytes(plan.config)
    counted = partial(count_checkpoints, copied=rows)
    plan.checkpoints = plan.attempt(counted, plan.config, *sizes)


def count_data(config: Settings) -> int | None:
    """Tokens in the local shards of the training data; None where a stream is not here."""
    samples = 0
    for _, _, folder in stream_folders(config):
        index = None if folder is None else folder / "index.json"
        if index is None or not index.is_file():
            return None
        shards = json.loads(index.read_text(encoding="utf-8"))["shards"]
        samples += sum(shard["samples"] for shard in shards)
    return samples * config["max_seq_len"]
