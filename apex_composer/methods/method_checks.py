"""What the methods refuse in the same words, at INIT, before data are read and weights moved."""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from composer.core import Algorithm, Precision, State

from apex_composer.settings import check_keys, is_number
from apex_composer.trainer.algorithm import APEX


def check_known(method: str, unknown: Mapping[str, Any], makes: Callable[..., Any]) -> None:
    """TypeError for settings besides the parameters of what makes the method."""
    check_keys(method, unknown, [name for name in signature(makes).parameters if name != "unknown"])


def check_share(method: str, share: Any) -> float:
    """The share as a float; ValueError unless 0 < share < 1."""
    if not is_number(share) or not 0 < share < 1:
        raise ValueError(
            f"{method}: share: got {share!r}, allowed: a number in (0, 1), the share that is "
            "trained. For all or nothing leave the method out"
        )
    return float(share)


def check_once(method: str, state: State, kind: type[Algorithm]) -> None:
    """Refuse a second algorithm of a kind, which checkpoints could not tell from the first."""
    count = sum(isinstance(algorithm, kind) for algorithm in state.algorithms)
    if count > 1:
        raise ValueError(f"algorithms: got {count} of the kind of {method}, allowed: one")


def check_unscaled(method: str, state: State) -> None:
    """Refuse amp_fp16, whose gradients are scaled and whose steps may be skipped."""
    if state.precision == Precision.AMP_FP16:
        raise ValueError(
            f"precision: got amp_fp16, allowed with {method}: amp_bf16, fp32. Its gradient scaler "
            "scales gradients and skips optimizer steps"
        )


def check_no_tensor_parallelism(method: str, state: State) -> None:
    """Refuse weights and activations that are cut along other axes than FSDP's."""
    if state.tp_config is not None:
        raise ValueError(
            f"tp_config: got tensor parallelism, allowed with {method}: FSDP, HSDP and DDP. Remove "
            "`tp_config` from the settings and shard with `fsdp_config`"
        )


def check_no_expansion(method: str, why: str, state: State) -> None:
    """Refuse APEX where it trains by itself; it may select and report.

    Args:
        method: name in the YAML.
        why: what the method would do to it, as the end of a sentence.
        state: the trainer's.
    """
    for algorithm in state.algorithms:
        if isinstance(algorithm, APEX) and (algorithm.expansion or algorithm.trainable != "all"):
            raise ValueError(
                f"algorithms: got {method} beside {type(algorithm).__name__.lower()}, which {why}. "
                "Remove one of the two; allowed is an apex that selects and reports only "
                "(expansion: false with trainable: all)"
            )


def check_resumed(method: str, checkpoint: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint that was trained with other settings."""
    for setting, value in now.items():
        if checkpoint[setting] != value:
            raise ValueError(
                f"{method}: {setting}: the checkpoint was trained with {checkpoint[setting]!r}, "
                f"this run says {value!r}. Set it back to resume, or start a new run from the "
                "checkpoint's weights (load_weights_only: true)"
            )
