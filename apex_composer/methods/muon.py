"""Muon on the matrices of attention and FFN, from the package pytorch-optimizer."""

from collections.abc import Iterable
from inspect import signature
from typing import Any

from torch.optim import Optimizer

from apex_composer import settings
from apex_composer.extras import needing
from apex_composer.methods.matrix_groups import check_matrices, check_whole
from apex_composer.methods.matrix_settings import check_values


class Muon(Optimizer):
    """Muon (Keller Jordan, kellerjordan.github.io/posts/muon), with AdamW for all but matrices.

        b <- momentum b + (1 - momentum) g,  u = (1 - momentum) g + momentum b,
        W <- (1 - lr weight_decay) W - lr sqrt(max(1, rows / columns)) NewtonSchulz(u)

    NewtonSchulz is 5 steps in bfloat16. Fused projections are taken as one matrix. Rows are a
    weight's outputs: GPT-2, which stores weights as [inputs, outputs], is refused by name; param
    groups of your own must have no such weights, too. Making one gives
    the package's own object, and loads the package: the class is what llm-foundry looks up.

    Args:
        params: param groups; those with `matrices: true` are Muon's (`matrix_groups`).
        given: settings of `pytorch_optimizer.Muon`, of which the following are the usual ones.
        lr: learning rate of the matrices; schedulers scale `adamw_lr` with it. Default 0.02.
        momentum: of the matrices. Default 0.95.
        nesterov: whether the momentum is Nesterov's, as in the formula. Default True.
        weight_decay: times lr, of the matrices. Default 0.
        ns_steps: steps of NewtonSchulz. Default 5.
        adamw_lr: learning rate of all other parameters. Default 3e-4.
        adamw_betas: of AdamW. Default 0.9, 0.95.
        adamw_wd: weight decay of AdamW, times adamw_lr. Default 0.
        adamw_eps: of AdamW. Default 1e-10.

    Raises:
        MissingExtraError: the package is not installed.
        ValueError: for a setting out of range; where no group has matrices, or those of GPT-2; in
            a step, for shards.
        TypeError: for an unknown setting.
    """

    def __new__(cls, params: Iterable[Any], **given: Any) -> Optimizer:
        """The package's optimizer."""
        with needing("optimizer: muon"):
            from pytorch_optimizer import Muon as PackagesMuon
        known = [*signature(PackagesMuon).parameters][1:-1]  # without params and kwargs
        settings.check_keys("optimizer: muon", given, known)
        own = [setting for setting in known if not setting.startswith("adamw_")]
        groups = check_matrices("muon", params, (*own, "betas", "eps", "transposed"))
        groups = [group for group in groups if not _is_transposed(group)]
        for each in (given, *groups):
            check_values("muon", each)
        for group in groups:
            group["use_muon"] = group.setdefault("matrices", False)
        optimizer = PackagesMuon(groups, **given)
        optimizer.register_step_pre_hook(_check_shards)
        return optimizer


def _is_transposed(group: dict[str, Any]) -> bool:
    """Whether this is the group that looks for GPT-2's weights; refuse what it has found."""
    transposed = group.pop("transposed", False)
    if transposed and group["params"]:
        raise ValueError(
            "optimizer: muon: got weights that are stored as [inputs, outputs] (GPT-2), allowed: "
            "[outputs, inputs], by which it scales an update. Use AdamW, or another model"
        )
    return transposed


def _check_shards(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["matrices"] else ():
            check_whole("muon", parameter)
