"""Whether checkpoints can be averaged: found out before anything is written."""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from apex_composer.tools.saved_model import SavedModel

# Of a list of names, what an error shows.
_SHOWN = 3


def check_paths(paths: Sequence[Path]) -> None:
    """Refuse a checkpoint that is given twice, also by a link."""
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist. Needed: local checkpoints")
    for one, other in combinations(paths, 2):
        if os.path.samefile(one, other):
            raise ValueError(f"{one} and {other} are the same checkpoint: give each once")


def check_same_kind(models: Sequence[SavedModel]) -> None:
    """Refuse checkpoints of different models or tokenizers, and copies of one checkpoint.

    Raises:
        ValueError: naming two files and what differs.
    """
    for one, other in combinations(models, 2):
        if None not in one.run and one.run == other.run:
            name, batch = one.run
            raise ValueError(
                f"{one.path} and {other.path} are both batch {batch} of run {name!r}: give one"
            )
    first = models[0]
    for other in models[1:]:
        for difference in _differences(first, other):
            raise ValueError(
                f"{first.path} and {other.path} cannot be averaged, {difference}. Only checkpoints "
                "of one run, and of branches of it, have a mean that means something"
            )


def _differences(one: SavedModel, other: SavedModel) -> Iterator[str]:
    """What two checkpoints differ in, one phrase each."""
    names = sorted(one.tensors.keys() ^ other.tensors.keys())
    if names:
        yield f"one of them has {_listed(names)} and the other has not"
    for name in one.tensors.keys() & other.tensors.keys():
        kinds = [(list(m.tensors[name].shape), m.tensors[name].dtype) for m in (one, other)]
        if kinds[0] != kinds[1]:
            yield f"{name} differs: " + ", and ".join(f"{dtype} {s}" for s, dtype in kinds)
    all_settings, all_others = _settings(one), _settings(other)
    for part in sorted(all_settings.keys() | all_others.keys()):
        settings, others = all_settings.get(part, {}), all_others.get(part, {})
        keys = [k for k in settings.keys() | others.keys() if settings.get(k) != others.get(k)]
        if keys:
            yield f"{part} differs in {_listed(sorted(keys))}"


def _settings(model: SavedModel) -> dict[str, dict[str, Any]]:
    """Configuration, adapters and tokenizer, without what may change within a run."""
    found = {}
    for name, file in {**model.huggingface["model"], **model.huggingface["tokenizer"]}.items():
        content = file["content"]
        settings = content if isinstance(content, dict) else {"its content": content}
        # Who has written it and from where; and what the last batch was padded to.
        passing = ("transformers_version", "name_or_path", "base_model_name_or_path")
        passing = (*passing, "inference_mode", "padding", "truncation")
        found[name] = {
            key: _without_empty(value)
            for key, value in settings.items()
            if key not in passing and not key.startswith("_") and value != {}
        }
    return found


def _without_empty(value: Any) -> Any:
    """Shards do not keep empty mappings."""
    if isinstance(value, list):
        return [_without_empty(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {key: _without_empty(one) for key, one in value.items() if one != {}}


def check_complete(model: SavedModel, names: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights are not those that its configuration builds.

    Args:
        model: checkpoint, without adapters.
        names: the built model's weights by name; tied ones are the same object.
    """
    others = {name for _, *others in tied_names(names) for name in others}
    missing = sorted(names.keys() - model.tensors.keys() - others)
    unknown = sorted(model.tensors.keys() - names.keys())
    if missing or unknown:
        told = [f"has no {_listed(missing)}"] * bool(missing)
        told += [f"has {_listed(unknown)}, which is not a part of the model"] * bool(unknown)
        raise ValueError(f"{model.path} {' and '.join(told)}: its configuration builds another")
    for name in names.keys() & model.tensors.keys():
        found, built = model.tensors[name].shape, names[name].shape
        if found != built:
            raise ValueError(
                f"{model.path}: {name} is {list(found)}, its configuration builds {list(built)}"
            )


def tied_names(names: Mapping[str, Any]) -> list[list[str]]:
    """Groups of names that are one weight; the first of each is the one that is written."""
    groups: dict[int, list[str]] = {}
    for name, weight in names.items():
        groups.setdefault(id(weight), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def check_equal(
    models: Sequence[SavedModel], names: Mapping[str, Any], exact: Sequence[str]
) -> None:
    """Refuse tied weights that are not the same, and what has no mean but differs.

    Args:
        models: checkpoints, without adapters.
        names: as in `check_complete`.
        exact: names of buffers and of integers.
    """
    for model in models:
        for first, *others in tied_names(names):
            for name in others:
                if {first, name} <= model.tensors.keys() and not _equal(model, first, model, name):
                    raise ValueError(
                        f"{model.path}: {first} and {name} are one weight by the configuration "
                        "(tie_word_embeddings) but differ in the checkpoint"
                    )
    first = models[0]
    for other in models[1:]:
        for name in exact:
            if not _equal(first, name, other, name):
                raise ValueError(
                    f"{first.path} and {other.path} differ in {name}, of which no mean can be "
                    "taken (a buffer, or integers)"
                )


def _equal(one: SavedModel, name: str, other: SavedModel, its_name: str) -> bool:
    import torch

    return torch.equal(one.read(name), other.read(its_name))


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
