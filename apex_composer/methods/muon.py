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
        given: settings of pytorch_optimizer.Muon: of Muon `lr` (default 0.02), `momentum`,
            `nesterov`, `weight_decay`, `ns_steps`; of AdamW `adamw_lr` (default 3e-4),
            `adamw_betas`, `adamw_wd`, `adamw_eps`. Schedulers scale both rates.

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
