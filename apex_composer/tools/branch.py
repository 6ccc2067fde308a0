"""A new run from a checkpoint with other settings: the YAML for it, with its lineage."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_composer.tools.checkpoint_file import CheckpointFile, hash_file, read_checkpoint
from apex_composer.tools.training_yaml import (
    build_algorithm,
    lay_out_stages,
    load_configuration,
    local_save_folder,
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


@dataclass(frozen=True)
class Branch:
    """What was written.

    Attributes:
        run_name: name of the new run.
        point: lineage entry, as it stands in the YAML below `algorithms.apex.branch`.
        keeps_stage: whether the running stage goes on with its operators.
    """

    run_name: str
    point: dict[str, Any]
    keeps_stage: bool


def write_branch(
    checkpoint: Path, yaml: Path, out: Path, changes: Sequence[str], *, overwrite: bool = False
) -> Branch:
    """Write the YAML of a run that goes on from a checkpoint with other settings.

    The weights are not copied: the YAML's `load_path` names the parent, and its `branch` tells the
    algorithm that settings may differ, and what to keep as lineage.

    Args:
        checkpoint: file of the parent run.
        yaml: file of the parent run.
        out: YAML to write.
        changes: `key=value` entries as on llm-foundry's command line.
        overwrite: whether `out` may exist. Default: no.

    Raises:
        FileNotFoundError, FileExistsError: a file is missing, or in the way.
        ValueError, TypeError: a setting is out of range, unknown, or that of the parent's folder.
    """
    from omegaconf import OmegaConf

    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists: give another --out, or --overwrite")
    parent = read_checkpoint(checkpoint)
    before = OmegaConf.create(load_configuration(yaml, resolve=False))
    _check_parent(parent, before, yaml)
    after = OmegaConf.merge(before, OmegaConf.from_dotlist(list(changes)))
    keys = [change.partition("=")[0] for change in changes]
    if "run_name" not in keys:
        after.run_name, keys = out.stem, [*keys, "run_name"]
    after.load_path, after.load_weights_only = str(parent.path.resolve()), False
    after.pop("load_ignore_keys", None)
    after.algorithms.apex.pop("branch", None)
    point = {
        "parent": after.load_path,
        "sha256": hash_file(parent.path),
        "batch": parent.clock["batch"],
        "stage": parent.apex["stage"],
        "changed": {key: [_select(before, key), _select(after, key)] for key in keys},
    }
    keeps = _keeps_the_stage(parent, after)
    _check_folder(parent, after)
    after.algorithms.apex.branch = point
    out.write_text(_HEADER.format(**point) + OmegaConf.to_yaml(after), encoding="utf-8")
    return Branch(after.run_name, point, keeps)


def _select(config: Any, key: str) -> Any:
    """A setting with its references resolved, None where there is none."""
    from omegaconf import OmegaConf

    value = OmegaConf.select(config, key)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _check_parent(parent: CheckpointFile, config: Any, yaml: Path) -> None:
    """Refuse a YAML that is not the parent's: its differences would not be in the lineage."""
    algorithm = build_algorithm(_select(config, "algorithms"))
    if algorithm is None:
        raise ValueError(f"{yaml} has no algorithms.apex: give the YAML of the parent run (--yaml)")
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
    layout = lay_out_stages(algorithm.stages, str(config.max_duration))
    if layout is None:  # in epochs: only the run itself knows
        return False
    if layout.ends[-1] <= parent.now(layout.unit):
        raise ValueError(
            f"max_duration: got {config.max_duration}, but {parent.path} is at batch "
            f"{parent.clock['batch']} already: --set max_duration (and stages) to train longer"
        )
    return keeps_the_stage(parent.apex, settings, list(algorithm.targets), layout)


def _check_folder(parent: CheckpointFile, config: Any) -> None:
    """Refuse to save where the parent does: autoresume would take the parent's checkpoints."""
    folder = local_save_folder(config)
    if folder is not None and folder.resolve() == parent.path.resolve().parent:
        raise ValueError(
            f"save_folder: got {folder}, the folder of the parent's checkpoints. Give the branch "
            "its own: --set save_folder=..., or ${run_name} in the path"
        )
