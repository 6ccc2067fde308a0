"""What a run with LoRA would lose in silence: trained or changed weights that no file holds."""

from collections.abc import Iterator, Mapping
from typing import Any

# Their beginnings; peft subtracts the first B A from the base as it adds the adapter.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")
_SAVED = (
    "Set model.should_save_peft_only: false (llm-foundry's default is true), so that checkpoints "
    "hold the whole model"
)


def check_adapters(config: Mapping[str, Any]) -> None:
    """Refuse adapters whose checkpoint or export would not give the trained model back.

    With `model.should_save_peft_only`, which is llm-foundry's default, checkpoints hold the
    weights that have `lora_` in their names and nothing else; llm-foundry's `hf_checkpointer`
    writes the adapter only, whatever that says. Both are right where the base stays as it was
    loaded: LoRA, DoRA, rsLoRA. And adapters must not be trained in a short dtype.

    Args:
        config: llm-foundry's configuration of the run.

    Raises:
        ValueError: naming the setting that loses something, and what to do.
    """
    model = config.get("model") or {}
    peft = model.get("peft_config")
    if not peft:
        return
    if str(peft.get("init_lora_weights")).lower() == "eva":
        raise ValueError(
            "model.peft_config.init_lora_weights: got eva, which needs a pass over the data that "
            "llm-foundry does not make: it would be LoRA. Remove it, or use pissa, olora"
        )
    if model.get("master_weights_dtype") is not None:
        raise ValueError(
            f"model.master_weights_dtype: got {model['master_weights_dtype']} with peft_config: "
            "llm-foundry gives the adapters that dtype too, and nothing keeps copies of them, so "
            "that most steps would be rounded away. Remove it: the base is sharded like the rest"
        )
    changed = list(_changes_of_the_base(peft, config.get("algorithms") or {}))
    for told in [*changed, *_unsaved(peft)] if model.get("should_save_peft_only", True) else []:
        raise ValueError(f"model.should_save_peft_only: got true with {told}. {_SAVED}")
    _check_shards(model, config)
    if changed and "hf_checkpointer" in (config.get("callbacks") or {}):
        raise ValueError(
            f"callbacks: got hf_checkpointer with {changed[0]}: it writes the adapter without the "
            "base that belongs to it. Remove it, and make a Hugging Face model of a checkpoint: "
            "apex-composer merge CHECKPOINT --out FOLDER"
        )


def _check_shards(model: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Sharded checkpoints of adapters only would be saved, but not loaded again."""
    sharded = (config.get("fsdp_config") or {}).get("state_dict_type") == "sharded"
    strict = config.get("load_strict_model_weights", True)
    if sharded and strict and model.get("should_save_peft_only", True):
        raise ValueError(
            "fsdp_config.state_dict_type: got sharded with model.should_save_peft_only: true "
            "(llm-foundry's default), whose checkpoints cannot be loaded: the base is missing in "
            "them. Set state_dict_type: full, the adapters are small; or should_save_peft_only: "
            "false"
        )


def _changes_of_the_base(peft: Mapping[str, Any], algorithms: Any) -> Iterator[str]:
    first = str(peft.get("init_lora_weights")).lower()
    if first.startswith(_CHANGE_THE_BASE):
        # peft does it again on loading: rounded otherwise on another machine, and for
        # pissa_niter_... from random numbers.
        yield (
            f"model.peft_config.init_lora_weights: {first}, which changes the base as the model is "
            "built, on every start anew"
        )
    if "relora" in algorithms:
        yield "algorithms: relora, which merges adapters into the base"


def _unsaved(peft: Mapping[str, Any]) -> Iterator[str]:
    """What is trained under names without `lora_`."""
    for setting in ("modules_to_save", "trainable_token_indices"):
        if peft.get(setting):
            yield f"model.peft_config.{setting}, which are trained beside the adapters"
    if peft.get("bias") == "lora_only":  # `all` is saved by another rule
        yield "model.peft_config.bias: lora_only, whose biases are trained beside the adapters"
