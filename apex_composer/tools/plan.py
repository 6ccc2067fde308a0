"""What a training YAML will do, in numbers, without training: `apex-composer plan`."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apex_composer.callbacks.disk import (
    Clock,
    check_disk,
    checkpoint_bytes,
    count_kept,
    count_saves,
    moments,
)
from apex_composer.callbacks.start_checks import check_batches, check_context
from apex_composer.tools.model_size import (
    Cost,
    GroupKind,
    build_shapes,
    count_parameters,
    describe_groups,
    estimate_cost,
)
from apex_composer.tools.training_yaml import (
    Settings,
    check_names,
    lay_out_stages,
    stream_folders,
)

# llm-foundry's own 1B model at this context reaches 0.40 on H100 and 0.59 on A100 (its README).
DEFAULT_MFU = 0.40


@dataclass(frozen=True)
class StageRow:
    """One stage: where it ends (time unit as given), its tokens, learning rate and operators."""

    end: str
    tokens: float
    learning_rate: float | None
    expansion: bool


@dataclass(frozen=True)
class Checkpoints:
    """How many a run writes, how many are on the disk at most, and how large one is."""

    folder: str
    saves: int | None
    kept: int | None
    size: int


@dataclass
class Plan:
    """All that `make_plan` found; what is None could not be found out, and `problems` say why."""

    config: Settings
    gpus: int
    problems: list[str] = field(default_factory=list)
    stages: list[StageRow] = field(default_factory=list)
    parameters: int | None = None
    flops_per_token: float | None = None
    groups: list[GroupKind] = field(default_factory=list)
    cost: Cost | None = None
    checkpoints: Checkpoints | None = None
    data_tokens: int | None = None

    @property
    def tokens(self) -> float:
        """Of the whole run."""
        return sum(stage.tokens for stage in self.stages)

    def attempt(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function; what it refuses becomes a problem, and the result None."""
        try:
            return function(*arguments, **options)
        except (ValueError, TypeError, KeyError, OSError) as error:
            missing = f"{error} is missing in the YAML" if isinstance(error, KeyError) else None
            self.problems.append(missing or str(error))
            return None


def make_plan(config: Settings, gpus: int) -> Plan:
    """Check a configuration as far as that goes without data and weights, and count.

    Args:
        config: of `load_configuration`.
        gpus: ranks of the run.
    """
    plan = Plan(config, gpus)
    plan.problems += list(check_names(config))
    if plan.problems:  # everything below would only repeat them
        return plan
    clock = Clock(config["global_train_batch_size"], config["max_seq_len"])
    microbatch = config.get("device_train_microbatch_size", "auto")
    plan.attempt(check_batches, clock.samples, gpus, microbatch)
    algorithm = plan.attempt(_algorithm, config)
    plan.stages = plan.attempt(_plan_stages, config, algorithm, clock) or []
    model = plan.attempt(build_shapes, config)
    if model is not None:
        _count_model(plan, model, algorithm, clock)
    plan.data_tokens = plan.attempt(count_data, config)
    return plan


def _algorithm(config: Settings) -> Any:
    from apex_composer.trainer.algorithm import APEX

    settings = (config.get("algorithms") or {}).get("apex")
    return None if settings is None else APEX(**settings)


def _plan_stages(config: Settings, algorithm: Any, clock: Clock) -> list[StageRow]:
    """Stages of the algorithm and the scheduler, which must agree; else the run as one stage."""
    from apex_composer.trainer.scheduler import StagewiseScheduler

    settings, scheduler = dict(config["scheduler"]), None
    if settings.pop("name") == "stagewise":
        scheduler = StagewiseScheduler(**settings)
    duration, owner = str(config["max_duration"]), algorithm or scheduler
    layout = lay_out_stages(owner.stages if owner else 1, duration)
    if layout is None:
        return []
    if scheduler is not None and algorithm is not None:
        other = lay_out_stages(scheduler.stages, duration)
        if other is None or other.ends != layout.ends:
            raise ValueError(
                f"stages: the scheduler stagewise ends them at "
                f"{other.describe() if other else scheduler.stages}, the algorithm apex at "
                f"{layout.describe()}: give both the same stages"
            )
    unit, rows = layout.unit, []
    for number, (start, end) in enumerate(zip(layout.starts(), layout.ends, strict=True)):
        rate = None
        if scheduler is not None:
            rate = config["optimizer"]["lr"] * scheduler.lr_multipliers[number]
        tokens = clock.batches(end - start, unit) * clock.samples * clock.length
        expansion = algorithm is not None and algorithm.expansion and layout.expansion[number]
        rows.append(StageRow(f"{end:,}{unit}", tokens, rate, expansion))
    return rows


def _count_model(plan: Plan, model: Any, algorithm: Any, clock: Clock) -> None:
    config, shape = plan.config, model.config
    plan.parameters = count_parameters(model)
    layers = getattr(shape, "num_hidden_layers", None) or shape.n_layers
    width = getattr(shape, "hidden_size", None) or shape.d_model
    # As llm-foundry counts: 6 for every weight and token, and attention over the whole context.
    plan.flops_per_token = 6 * plan.parameters + 12 * layers * width * clock.length
    for name in ("max_position_embeddings", "max_seq_len"):
        plan.attempt(check_context, clock.length, getattr(shape, name, None), name)
    if algorithm is not None:
        plan.groups = plan.attempt(describe_groups, model, algorithm) or []
        plan.cost = plan.attempt(estimate_cost, model, algorithm) if plan.groups else None
    if config.get("save_folder") is not None:
        plan.checkpoints = plan.attempt(_plan_checkpoints, config, plan.parameters, clock)


def _plan_checkpoints(config: Settings, parameters: int, clock: Clock) -> Checkpoints:
    saves = count_saves(config["max_duration"], config.get("save_interval", "1000ba"), clock)
    kept = count_kept(saves, config.get("save_num_checkpoints_to_keep", -1))
    weights_only = config.get("save_weights_only", False)
    optimizer = moments(config["optimizer"]["name"])
    size = checkpoint_bytes(parameters, optimizer, weights_only=weights_only)
    folder = config["save_folder"].replace("{run_name}", str(config.get("run_name")))
    if kept is not None and "://" not in folder:
        path = Path(folder)
        existing = sum(file.stat().st_size for file in path.glob("*.pt") if not file.is_symlink())
        check_disk(path, kept, size, existing=existing)
    return Checkpoints(folder, saves, kept, size)


def count_data(config: Settings) -> int | None:
    """Tokens in the local shards of the training data; None where a stream is not here.

    Args:
        config: of `load_configuration`.
    """
    samples = 0
    for _, _, folder in stream_folders(config):
        index = None if folder is None else folder / "index.json"
        if index is None or not index.is_file():
            return None
        shards = json.loads(index.read_text(encoding="utf-8"))["shards"]
        samples += sum(shard["samples"] for shard in shards)
    return samples * config["max_seq_len"]
