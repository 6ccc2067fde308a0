"""What a run must be like for APEX, checked before data are read and weights moved."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from composer.algorithms import LayerFreezing
from composer.core import Precision, State
from composer.utils import dist

from apex_composer.assessment.collector import assessments
from apex_composer.model.sites import Site, clean_name
from apex_composer.operators.main_optimizer import param_group_places
from apex_composer.operators.step_hooks import attachments
from apex_composer.sharding.make_executors import check_sharded
from apex_composer.trainer.stage_plan import StagePlan

if TYPE_CHECKING:
    from apex_composer.expander import Expander


STILL_OPEN = (
    "algorithms: on this model or its optimizer another run of apex still acts, whose Trainer is "
    "open (perhaps its fit has failed): call trainer.close() of that Trainer first. It leaves an "
    "ordinary model, with what was trained as part of the weights"
)


def check_run(state: State, own: "Expander | None" = None) -> None:
    """Refuse runs that could only fail later.

    Args:
        state: the trainer's, before wrapping; and at FIT_START, for `fit()` may change it.
        own: the algorithm's Expander, default none so far.

    Raises:
        ValueError: for the precision, the optimizers, the sharding, or a second APEX.
        RuntimeError: an earlier run still acts on the model or the optimizer.
    """
    # S2FT is one, too.
    kinds = [{kind.__name__ for kind in type(each).__mro__} for each in state.algorithms]
    count = sum("APEX" in names for names in kinds)
    if count > 1:
        raise ValueError(
            f"algorithms: got apex {count} times, allowed: once (s2ft counts). Composer's "
            "checkpoints tell algorithms apart by their class only: give one of them all `targets`"
        )
    if state.precision == Precision.AMP_FP16:
        raise ValueError(
            "precision: got amp_fp16, allowed with apex: amp_bf16, fp32. Its gradient scaler "
            "skips optimizer steps"
        )
    if len(state.optimizers) != 1:
        raise ValueError(f"apex needs exactly one optimizer, got {len(state.optimizers)}")
    _check_alone(state, own)
    _check_sharding(state)


def check_expansion(state: State, sites: Sequence[Site], implementation: str) -> None:
    """Refuse before wrapping what operators could not work on: weights that are not trained.

    And kernels for weights that will be sharded, which could only be refused after wrapping.

    Args:
        state: the trainer's.
        sites: the sites to expand.
        implementation: `auto`, `torch` or `triton`.

    Raises:
        ValueError: for a weight that the optimizer does not train, or that will be frozen, or
            where kernels are asked for and weights will be sharded.
    """
    # FSDP2 has no strategies: it shards.
    whole = getattr(state.fsdp_config, "sharding_strategy", None) == "NO_SHARD"
    if state.fsdp_config is not None and dist.get_world_size() > 1 and not whole:
        check_sharded(implementation)
    param_group_places(sites, state.optimizers[0])
    if any(isinstance(algorithm, LayerFreezing) for algorithm in state.algorithms):
        raise ValueError(
            "algorithms: got layer_freezing, which takes weights out of the optimizer that apex "
            "expands. Remove one of the two (expansion: false selects and reports only)"
        )
    frozen = frozen_by_callback(state)
    for site in sites:
        for parameter in site.parameters():
            if id(parameter) in frozen:
                raise ValueError(
                    f"callbacks: layer_freezing freezes {frozen[id(parameter)]}, which apex "
                    "expands: remove it from `layer_names`, or leave its kind out with `targets`"
                )


def frozen_by_callback(state: State) -> dict[int, str]:
    """Names, by id, of what llm-foundry's callback layer_freezing freezes, after all algorithms.

    It does so by name at FIT_START.
    """
    freezing = [c for c in state.callbacks if type(c).__name__ == LayerFreezing.__name__]
    names = {clean_name(name) for callback in freezing for name in callback.layer_names}
    return {id(p): n for n, p in state.model.named_parameters() if clean_name(n) in names}


def device_of(state: State) -> torch.device:
    """Where the model will be; at INIT it is on the CPU."""
    if state.device.name == "gpu":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(state.device.name)


def check_fit(state: State) -> None:
    """Let this package's callbacks refuse a fit before the first assessment reads data.

    Composer runs algorithms before callbacks at FIT_START. Until then it is not known whether a
    checkpoint's clock counts (`fit(reset_time=True)`), nor what data and duration `fit()` brings.

    Args:
        state: the trainer's, at FIT_START.
    """
    for callback in state.callbacks:
        check = getattr(callback, "check_fit", None)
        if check is not None:
            check(state)


def check_agreement(scheduler: StagePlan, algorithm: StagePlan) -> None:
    """Refuse a scheduler whose stages end elsewhere than the algorithm's."""
    if scheduler.ends != algorithm.ends:
        raise ValueError(
            f"stages: the scheduler stagewise ends them at {scheduler.describe()}, the algorithm "
            f"apex at {algorithm.describe()}: give both the same stages"
        )


def _check_alone(state: State, own: "Expander | None") -> None:
    """Refuse a model or an optimizer on which an earlier run still acts."""
    acting = [*attachments(state.optimizers[0]), *assessments(state.model)]
    if any(own is None or found not in (own.attachment, own.assessment) for found in acting):
        raise RuntimeError(STILL_OPEN)


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
