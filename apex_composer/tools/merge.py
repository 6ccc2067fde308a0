"""The mean of a run's checkpoints as a Hugging Face model; of one checkpoint, its conversion.

The baseline that costs no training: Model Merging in Pre-training of Large Language Models
(https://arxiv.org/abs/2505.12082) and WSM (https://arxiv.org/abs/2507.17634), which also weighs.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from apex_composer.callbacks.start_checks import free_bytes
from apex_composer.data_prep.atomic_files import new_folder
from apex_composer.data_prep.errors import DiskFullError
from apex_composer.data_prep.progress import progress_bar
from apex_composer.tools.merge_checks import (
    check_complete,
    check_equal,
    check_paths,
    check_same_kind,
    tied_names,
)
from apex_composer.tools.merged_adapters import merge_adapters
from apex_composer.tools.saved_model import (
    SavedModel,
    build_empty,
    is_foundry_mpt,
    open_saved_model,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Of a file of weights. It is in memory twice while it is written.
_SHARD = "1GB"
# Numbers that are added at once: in float64 they take 32 MB.
_BLOCK = 1 << 22


def merge(
    paths: Sequence[Path],
    out: Path,
    *,
    dtype: str | None = None,
    base: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write the mean of checkpoints as a folder for `from_pretrained`.

    Args:
        paths: checkpoints of Composer, files or folders of shards. Of a single one the weights
            stay bit for bit.
        out: folder to write; it appears when it is complete.
        dtype: torch's name of the dtype to write. Default: that of the checkpoints.
        base: folder or name of the model that training began with: for checkpoints of adapters
            only, and for its generation settings. Default: what adapters name, else none.
        overwrite: replace an earlier model in `out`. Default: refuse.

    Returns:
        What the user should know, one sentence each.

    Raises:
        FileNotFoundError, ValueError: the checkpoints have no mean, or there is no room for it;
            nothing has been written.
    """
    import torch

    _check_out(out, overwrite, [*paths, *([Path(base)] if base else [])])
    check_paths(paths)
    saved = [open_saved_model(path) for path in paths]
    empty = build_empty(saved[0])
    base = base or saved[0].huggingface["model"].get("peft_config", {}).get("content", {}).get(
        "base_model_name_or_path"
    )
    models = [merge_adapters(one, base) for one in saved]
    check_same_kind(models)
    weights = empty.state_dict(keep_vars=True)
    check_complete(models[0], weights)
    buffers = {name for name, _ in empty.named_buffers()} & weights.keys()
    integers = {name for name, one in models[0].tensors.items() if not one.is_floating_point()}
    check_equal(models, weights, sorted(buffers | integers))
    kinds = _written(models[0], weights, getattr(torch, dtype) if dtype else None)
    _check_room(out, kinds)
    notes = [*_run_notes(models), *_set_generation(empty, base)]
    with _whole_folder(out, overwrite) as folder:
        _write_model(empty, kinds, folder)
        notes += _write_tokenizer(models[-1], folder)
        _write_weights(models, kinds, buffers | integers, folder)
    return notes


def _check_out(out: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise ValueError(f"{out} exists: give another --out, or --overwrite")
    if out.is_symlink() or not (out / "config.json").is_file():
        raise ValueError(f"{out} is no folder of a model (no config.json): give another --out")
    for path in inputs:
        if path.exists() and path.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"--overwrite would delete {path}, which is read: give another --out")


def _written(
    model: SavedModel, weights: Mapping[str, Any], dtype: "torch.dtype | None"
) -> dict[str, "Tensor"]:
    """Shape and dtype of all that is written: of tied weights the first only."""
    left_out = {name for _, *others in tied_names(weights) for name in others}
    found = {name: model.tensors[name].to("meta") for name in weights if name not in left_out}
    return {
        name: one.to(dtype) if dtype and one.is_floating_point() else one
        for name, one in found.items()
    }


def _check_room(out: Path, kinds: Mapping[str, "Tensor"]) -> None:
    needed, free = sum(one.nbytes for one in kinds.values()), free_bytes(out.parent)
    if needed > free:
        raise ValueError(
            f"--out: the model needs {decimal(needed)}, free are {decimal(free)} beside {out}. "
            "Give a folder on another disk, or a smaller --dtype"
        )


def _run_notes(models: Sequence[SavedModel]) -> Iterator[str]:
    """Several runs are allowed: a branch has the weights of its parent, and another name."""
    runs = sorted({str(model.run[0]) for model in models})
    if len(runs) > 1:
        yield (
            f"The checkpoints are of several runs: {', '.join(runs)}. The mean is that of branches "
            "of one run; of runs that began with different weights it is worth nothing"
        )


def _set_generation(empty: Any, base: str | None) -> Iterator[str]:
    """Take over the base model's generation settings, which no checkpoint of Composer has."""
    from transformers import GenerationConfig

    try:
        if base is None:
            raise OSError("no --base was given")
        empty.generation_config = GenerationConfig.from_pretrained(base, local_files_only=True)
    except OSError as error:
        yield (
            "generation_config.json has what the model's configuration says of tokens, no more "
            f"({str(error).splitlines()[0]}). Checkpoints do not hold it; --base names the model "
            "that has it"
        )


@contextmanager
def _whole_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder that takes the place of `out` when the block ends well."""
    try:
        with new_folder(out) as folder:
            yield folder
            if overwrite and out.exists():
                shutil.rmtree(out)
    except DiskFullError as error:
        raise OSError(f"the disk is full while writing {out}: nothing is left behind") from error


def _write_model(empty: Any, kinds: Mapping[str, "Tensor"], folder: Path) -> None:
    """All but the weights: configuration, generation settings, code where the model has its own."""
    import torch

    floats = [one.dtype for one in kinds.values() if one.is_floating_point()]
    empty.to(reduce(torch.promote_types, floats))  # `torch_dtype` of the configuration
    empty.save_pretrained(folder, state_dict={})
    (folder / "model.safetensors").unlink(missing_ok=True)  # of no weights
    if is_foundry_mpt(empty.config.to_dict()):
        from llmfoundry.utils import edit_files_for_hf_compatibility

        edit_files_for_hf_compatibility(str(folder))


def _write_weights(
    models: Sequence[SavedModel], kinds: Mapping[str, "Tensor"], exact: set[str], folder: Path
) -> None:
    """One file of weights after the other, and their index where there are several."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(
        dict(kinds), filename_pattern="model{suffix}.safetensors", max_shard_size=_SHARD
    )
    total = sum(one.nbytes for one in kinds.values())
    with progress_bar(desc="merging", total=total, unit="B", unit_scale=True) as bar:
        for file, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                one, dtype = models[0].read(name), kinds[name].dtype
                shard[name] = one.to(dtype) if name in exact else mean(models, name, dtype)
                bar.update(kinds[name].nbytes)
            save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text)


def mean(models: Sequence[SavedModel], name: str, dtype: "torch.dtype") -> "Tensor":
    """`(W_1 + ... + W_K) / K`, summed in float64 and rounded once; of a single one, itself.

    Args:
        models: checkpoints, of which one is read at a time.
        name: a weight of theirs, of any shape.
        dtype: that of the result.

    Raises:
        ValueError: an entry of the mean is not finite.
    """
    import torch

    first = models[0].read(name)
    total = first.to(torch.float64, copy=True).reshape(-1)
    for model in models[1:]:
        parts = model.read(name).reshape(-1).split(_BLOCK)
        for whole, part in zip(total.split(_BLOCK), parts, strict=True):
            whole += part
    result = total.div_(len(models)).to(dtype).reshape(first.shape)
    if not result.isfinite().all():
        raise ValueError(f"{name}: its mean is not finite in {dtype}: {_not_finite(models, name)}")
    return result


def _not_finite(models: Sequence[SavedModel], name: str) -> str:
    bad = [str(one.path) for one in models if not one.read(name).isfinite().all()]
    return f"look at {', '.join(bad)}" if bad else "give another --dtype"


def _write_tokenizer(model: SavedModel, folder: Path) -> list[str]:
    """The tokenizer of a checkpoint, with its chat template."""
    from composer.models import HuggingFaceModel

    with TemporaryDirectory() as files:
        try:
            tokenizer = HuggingFaceModel.load_huggingface_tokenizer_from_saved_state(
                model.huggingface, tokenizer_save_dir=files
            )
        except Exception as error:
            raise ValueError(
                f"{model.path}: its tokenizer cannot be loaded ({type(error).__name__}: {error})"
            ) from error
        if tokenizer is None:
            return ["The checkpoints hold no tokenizer: add that of the run to the folder"]
        tokenizer.save_pretrained(folder)
    return []
