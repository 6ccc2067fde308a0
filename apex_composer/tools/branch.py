"""A new run from a checkpoint with other settings: the YAML for it, with its lineage."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_composer.tools.checkpoint_file import CheckpointFile, hash_file, read_checkpoint
from apex_composer.tools.cool_down import CHOSEN, cool_down
from apex_composer.tools.parent_checks import check_batches, check_rate
from apex_composer.tools.training_yaml import (
    build_algorithm,
    lay_out_stages,
    load_configuration,
)
from apex_composer.trainer.resuming import check_trained, keeps_the_stage, saved_settings

_HEADER = (
    "# Branched by `apex-composer branch` from {parent}\n"
    "# at batch {batch}. The checkpoint is read, never changed; this run saves to its own folder.\n"
)
# The settings that a checkpoint keeps, by their places in the YAML.
_KEPT = {
    "threshold": "threshold",
    "kv_heads": "kv_heads",
    "method": "assessment.method",
    "expansion": "expansion",
    "trainable": "trainable",
    "trainable_share": "trainable_share",
}

# What a branch decides itself: it goes on from the whole checkpoint.
_LOADING = ("load_path", "load_weights_only", "load_ignore_keys")
# Where a run writes what another run of the same folder would replace or resume from.
_FOLDERS = (
    "save_folder",
    "callbacks.hf_checkpointer.save_folder",
    "loggers.local_metrics.folder",
)


@dataclass(frozen=True)
class Branch:
    """What was written.

    Attributes:
        run_name: name of the new run.
        point: lineage entry, as it stands in the YAML below `algorithms.apex.branch`; in a run
            without APEX, which has no stage, below `metadata.lineage`.
        keeps_stage: whether the running stage goes on with its operators; None without APEX.
    """

    run_name: str
    point: dict[str, Any]
    keeps_stage: bool | None


def write_branch(
    checkpoint: Path,
    yaml: Path,
    out: Path,
    changes: Sequence[str],
    *,
    cooldown: str | None = None,
    overwrite: bool = False,
) -> Branch:
    """Write the YAML of a run that goes on from a checkpoint with other settings.

    The weights are not copied: the YAML's `load_path` names the parent, and its `branch` tells the
    algorithm that settings may differ, and what to keep as lineage.

    Args:
        checkpoint: file of the parent run.
        yaml: file of the parent run.
        out: YAML to write.
        changes: `key=value` entries as on llm-foundry's command line.
        cooldown: length of a decay of the learning rate, with which the run ends. Default: none.
        overwrite: whether `out` may exist. Default: no.

    Raises:
        FileNotFoundError, FileExistsError: a file is missing, or in the way.
        ValueError, TypeError: a setting is out of range, unknown, or that of the parent's folder.
    """
    from omegaconf import OmegaConf

    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists: give another --out, or --overwrite")
    parent = read_checkpoint(checkpoint, plain=True)
    before = OmegaConf.create(load_configuration(yaml, resolve=False))
    _check_parent(parent, before, yaml)
    check_rate(parent, _select(before, "optimizer.lr"), yaml)
    if not any(change.startswith("global_train_batch_size=") for change in changes):
        check_batches(parent, _select(before, "global_train_batch_size"), yaml)
    after, keys = _change(parent, before, changes, cooldown)
    if "run_name" not in keys:
        after.run_name, keys = out.stem, [*keys, "run_name"]
    after.load_path, after.load_weights_only = str(parent.path.resolve()), False
    after.pop("load_ignore_keys", None)
    point = {
        "parent": after.load_path,
        "sha256": hash_file(parent.path),
        "batch": parent.clock["batch"],
        "changed": {key: [_select(before, key), _select(after, key)] for key in keys},
    }
    _check_schedule(parent, after, cooldown is not None)
    _check_optimizer(parent, before, after, keys)
    _check_folders(parent, before, after)
    keeps = _write_lineage(parent, after, point)
    out.write_text(_HEADER.format(**point) + OmegaConf.to_yaml(after), encoding="utf-8")
    return Branch(after.run_name, point, keeps)


def _change(
    parent: CheckpointFile, config: Any, changes: Sequence[str], cooldown: str | None
) -> tuple[Any, list[str]]:
    """The new run's settings, and which of them the cool-down and then the user have given."""
    from omegaconf import OmegaConf

    keys = [change.partition("=")[0] for change in changes]
    for key in keys:
        if key.partition(".")[0] in _LOADING:
            raise ValueError(
                f"--set {key}: not with branch, which goes on from the whole checkpoint. To start "
                "from its weights alone write a YAML with load_path and load_weights_only: true"
            )
    settings = {} if cooldown is None else _cool_down(parent, config, cooldown, changes)
    changed = config.copy()
    for key, value in settings.items():
        OmegaConf.update(changed, key, value, merge=False)
    changed = OmegaConf.merge(changed, OmegaConf.from_dotlist(list(changes)))
    return changed, [*dict.fromkeys([*settings, *keys])]


def _cool_down(
    parent: CheckpointFile, config: Any, cooldown: str, changes: Sequence[str]
) -> dict[str, Any]:
    """What the YAML gets by the cool-down, which the user's changes may refine, not contradict.

    Tokens and samples are converted by the batches that the branch will have.
    """
    from omegaconf import OmegaConf

    others = [change for change in changes if change.partition("=")[0] not in CHOSEN]
    keys = [change.partition("=")[0] for change in others]
    for key in keys:
        if key.partition(".")[0] in ("max_duration", "scheduler"):
            raise ValueError(
                f"--set {key}: not with --cooldown, which decides max_duration and the scheduler. "
                f"Allowed of these: {', '.join(CHOSEN)}"
            )
    given = OmegaConf.merge(config, OmegaConf.from_dotlist(others))
    names = ("max_duration", "max_seq_len", "global_train_batch_size")
    settings = cool_down(parent, {n: _select(given, n) for n in names if n in given}, cooldown)
    for place in settings:
        if place not in keys and _select(config, place) != _select(given, place):
            raise ValueError(
                f"--set {', '.join(keys)}: not with --cooldown, for it changes {place} by a "
                f"reference, which the cool-down decides"
            )
    return settings


def _write_lineage(parent: CheckpointFile, config: Any, point: dict[str, Any]) -> bool | None:
    """Note where the run comes from; tell whether the running stage goes on."""
    from omegaconf import OmegaConf

    if not parent.apex:
        lineage = [*(_select(config, "metadata.lineage") or []), point]
        OmegaConf.update(config, "metadata.lineage", lineage)
        return None
    point["stage"] = parent.apex["stage"]
    config.algorithms.apex.pop("branch", None)
    keeps = _keeps_the_stage(parent, config)
    config.algorithms.apex.branch = point
    return keeps


def _select(config: Any, key: str) -> Any:
    """A setting with its references resolved, None where there is none."""
    from omegaconf import OmegaConf

    value = OmegaConf.select(config, key)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _check_parent(parent: CheckpointFile, config: Any, yaml: Path) -> None:
    """Refuse a YAML that is not the parent's: its differences would not be in the lineage."""
    algorithm = build_algorithm(_select(config, "algorithms"))
    if (algorithm is None) != (not parent.apex):
        yes, no = (yaml, parent.path) if algorithm is not None else (parent.path, yaml)
        raise ValueError(
            f"algorithms.apex: {yes} has it and {no} has not. Give the parent run's own YAML "
            "(--yaml), and a checkpoint that is whole (save_weights_only: false)"
        )
    if algorithm is None:
        return
    saved, given = saved_settings(parent.apex), _settings(parent, algorithm)
    pairs = {_KEPT[name]: (saved[name], given[name]) for name in _KEPT}
    pairs["targets"] = (parent.apex["targets"], list(algorithm.targets))
    for key, (trained, given) in pairs.items():
        if trained != given:
            raise ValueError(
                f"algorithms.apex.{key}: {yaml} says {given!r}, but {parent.path} was trained with "
                f"{trained!r}. Give the parent run's own YAML, and what changes with --set"
            )


def _settings(parent: CheckpointFile, algorithm: Any) -> dict[str, Any]:
    """A run's settings as its checkpoint would keep them."""
    settings = {name: getattr(algorithm, name) for name in _KEPT}
    saved = saved_settings(parent.apex)
    solved = saved["trainable"] != "half" and saved["trainable_share"] is not None
    if solved and all(saved[name] == settings[name] for name in ("trainable", "trainable_share")):
        settings["threshold"] = saved["threshold"]  # it was solved for the share
    return settings


def _keeps_the_stage(parent: CheckpointFile, config: Any) -> bool:
    """Check the new settings and stages; tell whether the running operators fit them."""
    algorithm = build_algorithm(_select(config, "algorithms"))
    check_trained(parent.apex, algorithm.trainable)
    settings = _settings(parent, algorithm)
    layout = lay_out_stages(algorithm.stages, config.max_duration)
    if layout is None:  # in epochs: only the run itself knows
        return False
    now = parent.now(layout.unit)
    return keeps_the_stage(parent.apex, settings, list(algorithm.targets), layout, now)


def _check_schedule(parent: CheckpointFile, config: Any, cools_down: bool) -> None:
    """Refuse a run that is over where it would begin, and a cool-down that cannot be.

    Where a run in epochs, iterations or seconds ends only itself can tell.
    """
    from composer.core import TimeUnit, ensure_time

    from apex_composer.trainer.wsd import WSDScheduler

    total = ensure_time(config.max_duration, TimeUnit.EPOCH)
    told = (TimeUnit.BATCH, TimeUnit.SAMPLE, TimeUnit.TOKEN)
    if total.unit in told and total.value <= parent.now(total.unit.value):
        raise ValueError(
            f"max_duration: got {config.max_duration}, but {parent.path} is at batch "
            f"{parent.clock['batch']} already: --set max_duration (and stages) to train longer"
        )
    if cools_down:
        settings = _select(config, "scheduler")
        WSDScheduler(**{name: value for name, value in settings.items() if name != "name"})


def _check_optimizer(parent: CheckpointFile, before: Any, after: Any, keys: Sequence[str]) -> None:
    """Refuse what Composer alone, in silence, would replace by the checkpoint's."""
    heard = parent.apex or _select(after, "scheduler.name") == "stagewise"
    if heard or _select(before, "optimizer") == _select(after, "optimizer"):
        return
    given = [key for key in keys if key.partition(".")[0] == "optimizer"]
    raise ValueError(
        f"--set {', '.join(given) or 'of what `optimizer` refers to'}: Composer restores the "
        f"optimizer's settings from {parent.path}, so that it would have no effect. Allowed in a "
        "run with apex, or with the scheduler stagewise; or start a new run from the weights "
        "(load_weights_only: true)"
    )


def _check_folders(parent: CheckpointFile, before: Any, after: Any) -> None:
    """Refuse to write where the parent does: autoresume would take the parent's checkpoints, and
    what was measured behind the branch's first batch would be the branch's."""
    for place in _FOLDERS:
        old, new = (_folder(config, place) for config in (before, after))
        if new is not None and (new == old or Path(new).resolve() == parent.path.resolve().parent):
            raise ValueError(
                f"{place}: got {new}, the folder of the parent's run. Give the branch its "
                f"own: --set {place}=..., or ${{run_name}} in the path"
            )


def _folder(config: Any, place: str) -> str | None:
    folder = _select(config, place)
    return folder and folder.replace("{run_name}", str(config.get("run_name"))).rstrip("/")
