"""What a run must be like for APEX, checked at INIT: before data and weights are loaded."""

from composer.core import Precision, State
from composer.utils import dist

from apex_composer.executors import check_sharded


def check_run(state: State) -> None:
    """Refuse runs that could only fail later.

    Args:
        state: of the trainer, before wrapping.

    Raises:
        ValueError: for the precision, the optimizers, or the sharding.
    """
    if state.precision == Precision.AMP_FP16:
        raise ValueError(
            "precision: got amp_fp16, allowed with apex: amp_bf16, fp32. Its gradient scaler "
            "skips optimizer steps"
        )
    if len(state.optimizers) != 1:
        raise ValueError(f"apex needs exactly one optimizer, got {len(state.optimizers)}")
    _check_sharding(state)


def check_implementation(state: State, implementation: str) -> None:
    """Refuse before wrapping what `executors.check_executors` would refuse after it.

    Args:
        state: of the trainer, before wrapping.
        implementation: `auto`, `torch` or `triton`.

    Raises:
        ValueError: where kernels are asked for and weights will be sharded.
    """
    if state.fsdp_config is not None and dist.get_world_size() > 1:
        # FSDP2 has no strategies: it shards.
        if getattr(state.fsdp_config, "sharding_strategy", None) != "NO_SHARD":
            check_sharded(implementation)


def _check_sharding(state: State) -> None:
    """Refuse before wrapping what `shards.find_shards` would refuse after it."""
    if state.tp_config is not None:
        raise ValueError(
            "tp_config: got tensor parallelism, allowed with apex: FSDP, HSDP and DDP. Remove "
            "`tp_config` from the settings and shard with `fsdp_config`"
        )
    if state.fsdp_config is not None and not state.fsdp_config.use_orig_params:
        raise ValueError(
            "fsdp_config: use_orig_params: got false, allowed with apex: true (the default). FSDP "
            "hides the single weights otherwise: remove the setting, or use FSDP_VERSION=2"
        )
