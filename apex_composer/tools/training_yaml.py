"""A training YAML as llm-foundry will see it, checked before anything is built."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from apex_composer.settings import check_choice, check_keys

Settings = dict[str, Any]


def load_configuration(yaml: Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a YAML, change the keys given on the command line, resolve references.

    Args:
        yaml: the file.
        overrides: `key=value` entries. Default: none.

    Returns:
        The configuration with `algorithms` as a mapping from name to settings.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML of settings, or a reference leads nowhere.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from apex_composer.trainer.config_transform import normalise_algorithms

    if not yaml.is_file():
        raise FileNotFoundError(f"{yaml} does not exist. Needed: a training YAML")
    try:
        merged = OmegaConf.merge(OmegaConf.load(yaml), OmegaConf.from_dotlist(list(overrides)))
        config = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{yaml}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{yaml} holds {type(config).__name__}, needed: a mapping of settings")
    return normalise_algorithms(config)


def check_names(config: Settings) -> Iterable[str]:
    """What llm-foundry would not know: keys at the top, and names of its registries.

    Args:
        config: of `load_configuration`.

    Yields:
        A sentence for each of them, with the nearest known name.
    """
    from dataclasses import MISSING, fields

    from llmfoundry import registry
    from llmfoundry.utils.config_utils import TRAIN_CONFIG_KEYS, TrainConfig
    from omegaconf import MISSING as NEEDED

    needed = {field.name for field in fields(TrainConfig) if field.default in (NEEDED, MISSING)}
    # llm-foundry itself computes these from global_train_batch_size.
    needed -= {"n_gpus", "device_train_grad_accum", "device_train_batch_size"}
    for key in sorted((needed | {"global_train_batch_size"}) - set(config)):
        yield f"{key}: missing, and llm-foundry has no default for it"
    for key in config:
        for sentence in _failure(check_keys, "llm-foundry", {key: None}, sorted(TRAIN_CONFIG_KEYS)):
            yield sentence.partition(" Known: ")[0]  # all of them would fill the screen
    callbacks = [*registry.callbacks.get_all(), *registry.callbacks_with_config.get_all()]
    for section, known in (
        ("callbacks", callbacks),
        ("algorithms", registry.algorithms.get_all()),
        ("loggers", registry.loggers.get_all()),
    ):
        for name in config.get(section) or {}:
            yield from _failure(check_choice, section, name, sorted(known))
    for section, known in (
        ("model", registry.models.get_all()),
        ("optimizer", registry.optimizers.get_all()),
        ("scheduler", registry.schedulers.get_all()),
        ("train_loader", registry.dataloaders.get_all()),
    ):
        name = (config.get(section) or {}).get("name")
        if section in config:
            yield from _failure(check_choice, f"{section}.name", name, sorted(known))


def _failure(check: Any, *arguments: Any) -> Iterable[str]:
    try:
        check(*arguments)
    except (ValueError, TypeError) as error:
        yield str(error)


def lay_out_stages(stages: Any, max_duration: str) -> Any:
    """The stage plan of a run that does not exist yet.

    Args:
        stages: as the algorithm holds them, of `parse_stages`.
        max_duration: as the YAML says it.

    Returns:
        A StagePlan, or None where the stages or the run are in epochs: their length is known
        when the data is.

    Raises:
        ValueError: the stages do not fill the run.
    """
    from composer.core import Time, TimeUnit, ensure_time

    from apex_composer.trainer.stages import plan_stages

    total = ensure_time(max_duration, TimeUnit.EPOCH)
    durations = [] if isinstance(stages, int) else [stage.duration for stage in stages]
    if TimeUnit.EPOCH in [time.unit for time in (total, *durations) if isinstance(time, Time)]:
        return None
    return plan_stages(stages, SimpleNamespace(max_duration=total, dataloader_len=None))


def stream_folders(config: Settings) -> list[tuple[str, str | None, Path | None]]:
    """The training data's streams: name, remote address, local folder of shards."""
    dataset = (config.get("train_loader") or {}).get("dataset") or {}
    streams = dataset.get("streams") or {"data": dataset}
    split = dataset.get("split")
    found = []
    for name, stream in streams.items():
        local, part = stream.get("local"), stream.get("split", split)
        folder = None if local is None else Path(local, part) if part else Path(local)
        found.append((name, stream.get("remote", dataset.get("remote")), folder))
    return found
