"""What a run must be like for ReLoRA, checked when the trainer is built."""

from composer.algorithms import EMA, SWA
from composer.core import State
from composer.utils import FSDPConfig

from apex_composer.methods.method_checks import check_unscaled
from apex_composer.operators.main_optimizer import keeps_weights


def check_run(state: State) -> None:
    """Refuse runs in which a restart could not be exact, or would be lost.

    Args:
        state: the trainer's, before wrapping.

    Raises:
        ValueError: naming the setting, what was given, and what is allowed.
    """
    if [type(algorithm).__name__ for algorithm in state.algorithms].count("ReLoRA") > 1:
        raise ValueError("algorithms: got relora more than once, allowed: once")
    _check_moments(state)
    check_unscaled("relora", state)
    if isinstance(state.fsdp_config, FSDPConfig) or state.tp_config is not None:
        raise ValueError(
            "fsdp_config: got FSDP1 or tensor parallelism, allowed with relora: FSDP2 (set "
            "FSDP_VERSION=2 in the environment) and DDP"
        )
    if getattr(state.model, "should_save_peft_only", False):
        raise ValueError(
            "model.should_save_peft_only: got true, allowed with relora: false. The base changes "
            "with every restart, and checkpoints would not hold it"
        )
    if any(type(c).__name__ == "HuggingFaceCheckpointer" for c in state.callbacks):
        raise ValueError(
            "callbacks: got hf_checkpointer with relora: it writes the adapter without the base "
            "that belongs to it. Remove it, and make a Hugging Face model of a checkpoint: "
            "apex-composer merge CHECKPOINT --out FOLDER"
        )


def _check_moments(state: State) -> None:
    """Refuse whatever keeps weights beside the model's, which a restart does not reach."""
    if len(state.optimizers) != 1:
        raise ValueError(f"relora needs exactly one optimizer, got {len(state.optimizers)}")
    if keeps_weights(state.optimizers[0]):
        raise ValueError(
            f"optimizer: got {type(state.optimizers[0]).__name__}, which keeps weights of its own, "
            "allowed with relora: one that keeps moments of gradients only (decoupled_adamw). A "
            "restart would prune these weights, and train on from those of the adapters before it"
        )
    averages = [type(each).__name__ for each in state.algorithms if isinstance(each, EMA | SWA)]
    if averages:
        raise ValueError(
            f"algorithms: got {averages[0]} with relora, allowed: one of the two. An average over "
            "a restart is of adapters that have nothing to do with each other, on a base that has "
            "moved. `apex-composer merge` averages checkpoints"
        )
