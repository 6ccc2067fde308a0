"""The model in a checkpoint of Composer; its weights stay on disk until they are asked for."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apex_composer.tools.checkpoint_file import load_state

if TYPE_CHECKING:
    from torch import Tensor

# Composer's name for the Hugging Face model inside its own.
_PREFIX = "model."


@dataclass(frozen=True)
class SavedModel:
    """A Hugging Face model as a checkpoint has it.

    Attributes:
        path: file, or folder of a sharded checkpoint.
        run: name of the run and the batch, as far as the checkpoint tells them.
        huggingface: Composer's record of the model's configuration, adapters and tokenizer.
        tensors: shape and dtype of each weight, as tensors that are not to be read.
        read: loads one of them by its name.
    """

    path: Path
    run: tuple[str | None, int | None]
    huggingface: dict[str, Any]
    tensors: Mapping[str, "Tensor"]
    read: Callable[[str], "Tensor"]


def open_saved_model(path: Path) -> SavedModel:
    """Open a checkpoint, one file (.pt) or the folder of a sharded one.

    It is unpickled, as Composer itself does it: open only checkpoints that you trust.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read whole, or holds no Hugging Face model.
    """
    state, read = _open_folder(path) if path.is_dir() else _open_file(path)
    huggingface = state.get("integrations", {}).get("huggingface", {})
    names = [name.removeprefix(_PREFIX) for name in state.get("model", ())]
    if "model" not in huggingface or not names:
        raise ValueError(
            f"{path} holds no weights of a Hugging Face model (hf_causal_lm, mpt_causal_lm or a "
            "HuggingFaceModel of Composer), and nothing else can become a Hugging Face folder"
        )
    clock = state.get("timestamp", {}).get("Timestamp", {})
    return SavedModel(
        path,
        (state.get("run_name"), clock.get("batch")),
        {"tokenizer": {}, **huggingface},  # shards do not keep what is empty
        dict(zip(names, state["model"].values(), strict=True)),
        lambda name: read(_PREFIX + name),
    )


def read_history(path: Path) -> tuple[int, list[dict[str, Any]]]:
    """The batch of a checkpoint, one file or a folder of shards, and APEX's records of its stages.

    Raises:
        FileNotFoundError, ValueError: as `open_saved_model`.
    """
    if path.is_dir():
        _read_index(path)
        state = _load_parts(path, "state.algorithms", "state.timestamp").get("state", {})
    else:
        state = load_state(path)
    apex = dict(state.get("algorithms", ())).get("APEX", {}).get("apex", {})
    clock = state.get("timestamp", {}).get("Timestamp", {})
    return clock.get("batch", 0), apex.get("history", [])


def _open_file(path: Path) -> tuple[dict[str, Any], Callable[[str], "Tensor"]]:
    state = load_state(path)
    return state, state.get("model", {}).__getitem__


def _open_folder(path: Path) -> tuple[dict[str, Any], Callable[[str], "Tensor"]]:
    """The same of what FSDP saves with `state_dict_type: sharded`: shards, and an index of them."""
    import torch

    index = _read_index(path)
    start = "state.model."
    state = _load_parts(path, "state.integrations", "state.run_name", "state.timestamp")["state"]
    state["model"] = {
        name.removeprefix(start): torch.empty(one.size, dtype=one.properties.dtype, device="meta")
        for name, one in index.state_dict_metadata.items()
        if name.startswith(start)
    }
    return state, lambda name: _load_parts(path, start + name)["state"]["model"][name]


def _read_index(path: Path) -> Any:
    """The index, which is written last, and whether the shards are as long as it says."""
    from torch.distributed.checkpoint import FileSystemReader

    try:
        index = FileSystemReader(path).read_metadata()
    except Exception as error:
        raise ValueError(
            f"{path} has no index (.metadata) that can be read ({type(error).__name__}: {error}): "
            "it is not the folder of a sharded checkpoint, or its save was killed"
        ) from error
    for place in index.storage_data.values():
        shard = path / place.relative_path
        if not shard.is_file() or shard.stat().st_size < place.offset + place.length:
            raise ValueError(f"{path} is torn: {shard.name} is missing or too short")
    return index


def _load_parts(path: Path, *names: str) -> dict[str, Any]:
    """Parts of a sharded checkpoint, as torch's own conversion to one file reads the whole."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    found: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner(keys=set(names))
    _load_state_dict(found, FileSystemReader(path), planner=planner, no_dist=True)
    return found


def build_empty(saved: SavedModel) -> Any:
    """The Hugging Face model of a checkpoint on the meta device, without adapters.

    By its configuration: the name of its class, which is saved too, is that of FSDP or peft where
    these have wrapped it.

    Raises:
        ValueError: it is no causal language model of transformers or llm-foundry.
    """
    from accelerate import init_empty_weights
    from composer.models.huggingface import get_hf_config_from_composer_state_dict
    from transformers import AutoModelForCausalLM

    record = deepcopy(saved.huggingface)  # Composer changes it
    content = record["model"]["config"]["content"]
    try:
        with init_empty_weights():
            if is_foundry_mpt(content):
                model = _build_mpt(content)
            else:
                config = get_hf_config_from_composer_state_dict(
                    {"state": {"integrations": {"huggingface": record}}}
                )
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise ValueError(
            f"{saved.path}: no model can be built of its configuration, with model_type "
            f"{content.get('model_type')!r} ({type(error).__name__}: {error}). Known are the "
            "causal language models of transformers and llm-foundry; code that was downloaded "
            "with a model is not run"
        ) from error
    model.tie_weights()  # the meta device has undone it
    return model


def is_foundry_mpt(content: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of llm-foundry's MPT; transformers' has the same type."""
    return content.get("model_type") == "mpt" and "ffn_config" in content


def _build_mpt(content: Mapping[str, Any]) -> Any:
    """With its code beside it when it is saved, as llm-foundry's own export has it."""
    from llmfoundry.models.mpt import MPTConfig, MPTForCausalLM

    MPTConfig.register_for_auto_class()
    MPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    return MPTForCausalLM(MPTConfig(**content))
