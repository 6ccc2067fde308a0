"""Which files of a data set on disk are for training: those of its other splits are left out."""

import json
import re
import warnings
from collections import defaultdict
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from apex_composer.data_prep.errors import InputNotFoundError, SettingsError, SourceError
from apex_composer.data_prep.read import remote

TRAIN = "train"
HELD_OUT = r"(test|validation|valid|val|dev)"
# A folder, or a file such as test-00000-of-00001.parquet or wikitext-test.arrow.
HELD_OUT_PATH = re.compile(
    rf"(^|/){HELD_OUT}(/|[-_.][^/]*$)|[-_]{HELD_OUT}(-\d+-of-\d+)?\.[^/]+$", re.IGNORECASE
)
SAVED = re.compile(r"(^|/)data-\d{5}-of-\d{5}\.arrow$")
CACHED = re.compile(r"(^|/)\d+\.\d+\.\d+/[0-9a-f]{16,}$")
DICTIONARY, STATE, INFO = "dataset_dict.json", "state.json", "dataset_info.json"


class Chosen(NamedTuple):
    """Files of a data set.

    Args:
        training: those that are read.
        left_out: those of other splits.
    """

    training: list[str]
    left_out: list[str]


def training_files(root: str, names: list[str], format: str) -> list[str]:
    """Leave out the files of splits other than `train`, with a warning that names the first.

    A split is told by the name of a folder or file (`test`, `validation`, `valid`, `val`, `dev`)
    and by what `datasets` writes beside its files: of a DatasetDict or a cache folder only `train`
    is read. The folder of a split, given as the input itself, is read.

    Args:
        root: the input.
        names: paths of all its files, sorted.
        format: `fineweb` or `arrow`.

    Raises:
        InputNotFoundError: nothing is left.
        SettingsError: a data set has no split `train`, or there are two versions of it.
        SourceError: a file that datasets has listed is missing.
    """
    if format == "arrow":
        chosen = _of_arrow(root, names)
    else:
        chosen = _by_path([name for name in names if name.endswith(".parquet")])
    if not chosen.training:
        raise InputNotFoundError(
            f"{root!r} holds no split for training, only others such as {chosen.left_out[:1]}. "
            "Give the folder of a split itself to read it; files that are named after their split "
            "need another name then."
        )
    if chosen.left_out:
        warnings.warn(
            f"{root!r}: files of other splits than train are left out, {len(chosen.left_out)} in "
            f"all, such as {chosen.left_out[0]}. To read a split give its own folder.",
            stacklevel=3,
        )
    return sorted(chosen.training)


def warn_of_held_out(root: str, names: list[str]) -> None:
    """Say that files which look held out are read, of a format that has no splits.

    Args:
        root: the input.
        names: paths of the files that are read.
    """
    held_out = [name for name in names if HELD_OUT_PATH.search(name)]
    if held_out:
        warnings.warn(
            f"{root!r}: {len(held_out)} files look held out for tests, such as {held_out[0]}, and "
            "are read as all others are. Move them out of the folder if you will evaluate on them.",
            stacklevel=3,
        )


def _by_path(names: list[str]) -> Chosen:
    held_out = [name for name in names if HELD_OUT_PATH.search(name)]
    return Chosen([name for name in names if not HELD_OUT_PATH.search(name)], held_out)


def _of_arrow(root: str, names: list[str]) -> Chosen:
    folders: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if name.endswith(".arrow") or PurePosixPath(name).name == STATE:
            folders[str(PurePosixPath(name).parent)].append(name)
    present = set(names)
    for name in names:
        if PurePosixPath(name).name == DICTIONARY:
            _check_splits(root, name, _read_json(root, name).get("splits"))
            if _join(str(PurePosixPath(name).parent / TRAIN), STATE) not in present:
                raise SourceError(f"{root}/{name} names the split {TRAIN}, which is not there.")
    _check_versions(root, [folder for folder in folders if _join(folder, INFO) in present])
    chosen = Chosen([], [])
    for folder, files in folders.items():
        found = _of_folder(root, folder, files, present)
        if HELD_OUT_PATH.search(f"{folder}/"):
            found = Chosen([], found.training + found.left_out)
        chosen.training.extend(found.training)
        chosen.left_out.extend(found.left_out)
    return chosen


def _of_folder(root: str, folder: str, files: list[str], present: set[str]) -> Chosen:
    if _join(folder, STATE) in present:
        return _of_saved(root, folder, present)
    if any(SAVED.search(name) for name in files):
        raise SourceError(
            f"{root}/{files[0]} has no {STATE} beside it: save_to_disk was not finished, or not "
            "all was copied."
        )
    if _join(folder, INFO) in present:
        return _of_cached(root, folder, files)
    return _by_path(files)


def _of_saved(root: str, folder: str, present: set[str]) -> Chosen:
    """What `save_to_disk` has listed in state.json; other files are leftovers of a cache."""
    state = _read_json(root, _join(folder, STATE))
    if state.get("_indices_data_files"):
        raise SettingsError(
            f"{root}/{folder} is a selection of rows of other files, as old versions of datasets "
            "saved it. Load it and save it again with the present one."
        )
    try:
        files = [_join(folder, entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError):
        files = []
    if not files:
        raise SourceError(
            f"{root}/{_join(folder, STATE)} lists no files as save_to_disk does. Save the data set "
            f"again, or move {STATE} away if it is of something else."
        )
    missing = [name for name in files if name not in present]
    if missing:
        raise SourceError(f"{root}/{missing[0]} is listed in its {STATE} but is not there.")
    parent, split = PurePosixPath(folder).parent, PurePosixPath(folder).name
    if folder != "." and _join(str(parent), DICTIONARY) in present:
        is_held_out = split != TRAIN
    else:  # given as the input itself, any split is read
        is_held_out = folder != "." and bool(re.fullmatch(HELD_OUT, str(state.get("_split"))))
    return Chosen([], files) if is_held_out else Chosen(files, [])


def _of_cached(root: str, folder: str, files: list[str]) -> Chosen:
    """What `load_dataset` has made; the results of `map` beside it (cache-*.arrow) are not data."""
    splits = _read_json(root, _join(folder, INFO)).get("splits")
    splits = list(splits) if isinstance(splits, dict) else splits
    _check_splits(root, _join(folder, INFO), splits)
    data = [name for name in files if not PurePosixPath(name).name.startswith("cache-")]
    pattern = re.compile(rf".+-{TRAIN}(-(\d{{5}})-of-(\d{{5}}))?\.arrow")
    shards = {name: match for name in data if (match := pattern.fullmatch(name))}
    counts = {int(match[3] or 1) for match in shards.values()}
    if counts != {len(shards)}:
        raise SourceError(
            f"{root}/{folder}: {len(shards)} files of the split {TRAIN} are there, and their "
            f"names say {sorted(counts) or 'that there are some'}. Load the data set again."
        )
    return Chosen(list(shards), [name for name in data if name not in shards])


def _check_splits(root: str, name: str, splits: Any) -> None:
    if not isinstance(splits, list) or TRAIN not in splits:
        raise SettingsError(
            f"{root}/{name} names the splits {splits}, none of which is {TRAIN!r}. Give the "
            "folder of one of them, saved by save_to_disk, to read it."
        )


def _check_versions(root: str, folders: list[str]) -> None:
    """Refuse two versions of one data set in a cache (<name>/<config>/<version>/<hash>)."""
    first: dict[PurePosixPath, str] = {}
    for folder in folders:
        config = PurePosixPath(folder).parent.parent
        if CACHED.search(folder) and first.setdefault(config, folder) != folder:
            raise SettingsError(
                f"{root!r} holds two versions of a data set, {first[config]} and {folder}, and "
                "reading both would train on it twice. Give the folder of one of them."
            )


def _read_json(root: str, name: str) -> dict[str, Any]:
    try:
        with remote.local_copy(f"{root}/{name}") as path:
            content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{root}/{name} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}


def _join(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"
