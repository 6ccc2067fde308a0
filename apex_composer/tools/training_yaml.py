"""A training YAML as llm-foundry will see it, checked before anything is built."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from apex_composer.settings import check_choice, check_keys
from apex_composer.tools.yaml_defaults import read_yaml

Settings = dict[str, Any]


def load_configuration(
    yaml: Path, overrides: Sequence[str] = (), *, resolve: bool = True
) -> Settings:
    """Read a YAML with its `defaults`, change the keys of the command line, resolve references.

    Args:
        yaml: file to read, by `read_yaml`.
        overrides: `key=value` entries. Default: none.
        resolve: whether references become what they lead to. Default: yes.

    Returns:
        The configuration with `algorithms` as a mapping from name to settings.

    Raises:
        FileNotFoundError: there is no such file, or none of its `defaults`.
        ValueError: it is no YAML of settings, or a reference leads nowhere.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from apex_composer.trainer.config_transform import normalise_algorithms

    try:
        merged = read_yaml(yaml, overrides)
        config = OmegaConf.to_container(merged, resolve=resolve, throw_on_missing=resolve)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{yaml}: {error}") from error
    return normalise_algorithms(config)


def build_algorithm(algorithms: Settings | None) -> Any:
    """The algorithm among a configuration's `algorithms`, or None; building it checks its settings.

    Raises:
        ValueError, TypeError: a setting is out of range or unknown.
    """
    from apex_composer.trainer.algorithm import APEX

    settings = (algorithms or {}).get("apex")
    return None if settings is None else APEX(**settings)


def build_methods(algorithms: Settings | None) -> Settings:
    """This package's algorithms by their names; building them checks their settings.

    Raises:
        ValueError, TypeError: a setting is out of range or unknown.
    """
    from llmfoundry import registry

    kinds = {name: registry.algorithms.get(name) for name in algorithms or {}}
    own = {name for name, kind in kinds.items() if kind.__module__.startswith("apex_composer.")}
    return {name: kinds[name](**algorithms[name]) for name in kinds if name in own}


def check_names(config: Settings) -> Iterator[str]:
    """What llm-foundry would not know: keys at the top, and names of its registries.

    Args:
        config: configuration of `load_configuration`.

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
    registries = {
        "callbacks": (registry.callbacks, registry.callbacks_with_config),
        "algorithms": (registry.algorithms,),
        "loggers": (registry.loggers,),
        "model": (registry.models,),
        "optimizer": (registry.optimizers,),
        "scheduler": (registry.schedulers,),
        "train_loader": (registry.dataloaders,),
    }
    for section, kinds in registries.items():
        known = sorted(name for kind in kinds for name in kind.get_all())
        value = config.get(section) or {}
        if section in ("callbacks", "algorithms", "loggers"):  # settings below their names
            for name in value:
                yield from _failure(check_choice, section, name, known)
        elif section in config:
            yield from _failure(check_choice, f"{section}.name", value.get("name"), known)


def _failure(check: Any, *arguments: Any) -> Iterator[str]:
    try:
        check(*arguments)
    except (ValueError, TypeError) as error:
        yield str(error)


def lay_out_stages(stages: Any, max_duration: int | str) -> Any:
    """Where the stages of a run that does not exist yet will end.

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


def local_save_folder(config: Settings) -> Path | None:
    """Where the checkpoints go on this machine; None for an object store, or where none are saved.

    Args:
        config: configuration of `load_configuration`, or OmegaConf's.
    """
    folder = config.get("save_folder")
    if folder is None or "://" in folder:
        return None
    return Path(folder.replace("{run_name}", str(config.get("run_name"))))
