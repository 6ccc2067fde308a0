"""What a run must be like for APEX, checked before data are read and weights moved."""

from composer.core import Precision, State


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


def check_fit(state: State) -> None:
    """Let this package's callbacks refuse a fit before the first assessment reads data.

    Composer runs algorithms before callbacks at FIT_START. Until then it is not known whether a
    checkpoint's clock counts (`fit(reset_time=True)`), nor what data and duration `fit()` brings.

    Args:
        state: of the trainer, at FIT_START.
    """
    for callback in state.callbacks:
        check = getattr(callback, "check_fit", None)
        if check is not None:
            check(state)


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
