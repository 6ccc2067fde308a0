"""Adapters of a checkpoint (LoRA and its relatives) merged into their base, by peft itself."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from apex_composer.tools.saved_model import SavedModel, build_empty

if TYPE_CHECKING:
    from torch import Tensor

# peft's name of the model that it wraps.
_BASE = "base_model.model."
# Where its modules keep those that they stand for.
_WRAPPED = ("base_layer", "original_module", "token_adapter.base_layer")
# Initialisations that leave the base as it is. The others (pissa, olora, corda, loftq) change it.
_BASE_STAYS = (True, False, "gaussian", "eva")


def merge_adapters(saved: SavedModel, base: str | None = None) -> SavedModel:
    """A checkpoint with adapters as one without: `W + s B A` where LoRA has W, A and B.

    One module after the other, when it is read, so that memory is needed for one module.

    Args:
        saved: checkpoint; without adapters it is returned as it is.
        base: folder or name of the base model, for checkpoints of adapters only. Default: that of
            the checkpoint's peft configuration.

    Raises:
        ValueError: the base is needed and cannot be found, or peft builds another model.
    """
    if "peft_config" not in saved.huggingface["model"]:
        return saved
    peft_model = _build_peft(saved)
    built = peft_model.state_dict()
    tensors, load = saved.tensors, saved.read
    if not built.keys() <= tensors.keys():
        tensors, load = _with_base(saved, base, built)
    for name, one in built.items():
        if name not in tensors or tensors[name].shape != one.shape:
            found = list(tensors[name].shape) if name in tensors else "nothing"
            raise ValueError(
                f"{saved.path}: {name} has {found}, peft builds {list(one.shape)} of the "
                "checkpoint's configuration. What is trained beside the adapters "
                "(modules_to_save) is saved with `model.should_save_peft_only: false` only"
            )
    owners = _outermost_adapters(peft_model)
    plain = {
        name: tensors[_raw_name(name, owners)].to("meta")
        for name in build_empty(saved).state_dict()
    }
    unknown = sorted(tensors.keys() - built.keys())
    plain |= {name: tensors[name] for name in unknown}  # compared, and refused, with all others
    return replace(saved, tensors=plain, read=lambda name: _read_merged(name, owners, load))


def _build_peft(saved: SavedModel) -> Any:
    """The model with adapters, on the meta device."""
    from accelerate import init_empty_weights
    from peft import LoraConfig, get_peft_model

    settings = saved.huggingface["model"]["peft_config"]["content"]
    # What an initialisation has done is in the weights; on the meta device none can be computed.
    config = LoraConfig(**{**settings, "init_lora_weights": False, "base_model_name_or_path": None})
    with init_empty_weights():
        return get_peft_model(build_empty(saved), config, autocast_adapter_dtype=False)


def _outermost_adapters(peft_model: Any) -> dict[str, Any]:
    """Modules that peft has put in the place of the model's, by the names of these."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, Any] = {}
    for name, module in peft_model.base_model.model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if not inside and isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            found[name] = module
    return found


def _owner(name: str, owners: Mapping[str, Any]) -> str | None:
    """The module among `owners` that a weight of the plain model belongs to."""
    return next((place for place in owners if name.startswith(f"{place}.")), None)


def _raw_name(name: str, owners: Mapping[str, Any]) -> str:
    """Where the peft model keeps the base's weight of a name."""
    place = _owner(name, owners)
    if place is None:
        return _BASE + name
    inside, last = owners[place].state_dict(), name.removeprefix(f"{place}.")
    kept = next(f"{wrapped}.{last}" for wrapped in _WRAPPED if f"{wrapped}.{last}" in inside)
    return f"{_BASE}{place}.{kept}"


def _read_merged(name: str, owners: Mapping[str, Any], load: Callable[[str], "Tensor"]) -> "Tensor":
    """A weight of the plain model, as `PeftModel.merge_and_unload` makes it."""
    import torch

    place = _owner(name, owners)
    if place is None:
        return load(_BASE + name)
    module = deepcopy(owners[place])
    inside = {key: load(f"{_BASE}{place}.{key}").clone() for key in module.state_dict()}
    module.load_state_dict(inside, assign=True)
    with torch.no_grad():
        if hasattr(module, "unload_and_optionally_merge_module"):
            module = module.unload_and_optionally_merge_module(True, False, None)
        else:
            module.merge()
            module = module.get_base_layer()
    return module.state_dict()[name.removeprefix(f"{place}.")]


def _with_base(
    saved: SavedModel, base: str | None, built: Mapping[str, "Tensor"]
) -> tuple[dict[str, "Tensor"], Callable[[str], "Tensor"]]:
    """The weights of a checkpoint of adapters only, and of its base."""
    settings = saved.huggingface["model"]["peft_config"]["content"]
    start = settings["init_lora_weights"]
    if start not in _BASE_STAYS:
        raise ValueError(
            f"{saved.path} holds adapters only, and init_lora_weights={start!r} had changed the "
            "base before they were trained. Needed: checkpoints with "
            "`model.should_save_peft_only: false`"
        )
    base = base or settings["base_model_name_or_path"]
    # llm-foundry gives base and adapters one dtype (master_weights_dtype).
    dtype = next(iter(saved.tensors.values())).dtype
    try:
        weights = _load_base(base, dtype)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{saved.path} holds adapters only, and their base {base!r} is not on this machine "
            f"({str(error).splitlines()[0]}). Needed: --base with the folder of the model that "
            "training began with, or checkpoints with `model.should_save_peft_only: false`"
        ) from error
    tensors = dict(saved.tensors)
    for name in built.keys() - tensors.keys():
        plain = name.removeprefix(_BASE).replace(".base_layer.", ".")
        if plain in weights:
            tensors[name] = weights[plain]
    return tensors, lambda name: saved.read(name) if name in saved.tensors else tensors[name]


@lru_cache(maxsize=1)  # the checkpoints of a run have one base
def _load_base(base: str | None, dtype: Any) -> dict[str, "Tensor"]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=dtype, local_files_only=True)
    return model.state_dict()
