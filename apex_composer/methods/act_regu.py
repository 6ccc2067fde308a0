"""Activation regularisation: units of a group are pushed towards equal activation norms."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from apex_composer.extras import needing

with needing("act_regu"):
    from composer.core import Algorithm, Callback, Event, State
    from composer.loggers import Logger

from apex_composer.distributed import sum_over_ranks, world_size
from apex_composer.methods.method_checks import (
    check_known,
    check_no_tensor_parallelism,
    check_once,
    check_resumed,
    check_unscaled,
)
from apex_composer.methods.penalised_activation import Layout, Penalised
from apex_composer.model.find_sites import find_sites
from apex_composer.model.sites import Group
from apex_composer.ops.packed_samples import find_samples
from apex_composer.settings import check_positive
from apex_composer.trainer.batches import attention_mask, look_at, sequence_ids


class ActRegu(Algorithm):
    """Adds to the loss the standard deviation of a group's activation norms.

        L = loss + coefficient * mean over samples x and groups G of  std of a_i(x) over i in G

    G: the query heads of a layer's attention, and the channels of its FFN; a_i(x) as in the
    assessment (arXiv 2505.24241, eq. 3): the Frobenius norm, over the sample's tokens, of the
    unit's activation before o_proj or down_proj. The standard deviation is that of the whole group
    (divided by U, not U - 1). In packed rows each sequence is a sample; padding does not count.

    The paper says no more than "we penalize the standard deviation of activations during the
    forward pass"; the formula and the coefficient are our choice. A norm grows with the square
    root of the sample's tokens, and with it the penalty: 0.01 lets a deviation of 1, on the
    scale of the norms, weigh as much as a hundredth of a nat. Look at `act_regu/penalty` (the mean
    before the coefficient, over all ranks' samples of a batch) and set it for your model.

    The penalty's gradient is added inside of the layers, where the backward pass comes by, not
    through the loss. So `loss/train/total` stays the model's own loss, to be compared with other
    methods', evaluation is not touched, the mean is exact over microbatches and ranks however
    Composer weighs the microbatches' losses, and activation checkpointing of either kind is right:
    what is recomputed adds its gradient once. It acts on whatever is trained, beside apex too.

    Source: arXiv 2505.24241, appendix B.3, table 7 (there 2.4 % of the parameters are trained).

    Args:
        coefficient: a positive number. Default 0.01.

    Raises:
        RuntimeError: in training, where layers have not called its hooks.
        ValueError: for a coefficient out of range; at INIT for an unknown architecture, amp_fp16
            and tensor parallelism; in training for a batch without `input_ids`; a resumed run's,
            for another coefficient.
        TypeError: for an unknown setting.
    """

    def __init__(self, *, coefficient: float = 0.01, **unknown: Any):
        check_known("act_regu", unknown, ActRegu)
        self.coefficient = check_positive("act_regu: coefficient", coefficient, float)
        self.layout: Layout | None = None  # of the running microbatch
        self._weight, self._samples, self._passes, self._penalties = 0.0, 0, 0, []
        self._padded = self._is_packed = False
        self._groups: list[Group] = []
        self._hooks = _Hooks()

    def match(self, event: Event, state: State) -> bool:
        """Run on the events that have a method here."""
        return hasattr(self, f"_on_{event.value}")

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Do the event's part."""
        getattr(self, f"_on_{event.value}")(state, logger)

    def state_dict(self) -> dict[str, Any]:
        """The coefficient."""
        return {**super().state_dict(), "settings": {"coefficient": self.coefficient}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse another coefficient than the checkpoint's."""
        check_resumed("act_regu", state["settings"], {"coefficient": self.coefficient})

    def collect(self, deviations: Tensor) -> None:
        """Take the deviations of a group, [B], once per forward pass."""
        self._penalties.append(deviations.sum())

    def _on_init(self, state: State, logger: Logger) -> None:
        check_once("act_regu", state, ActRegu)
        check_unscaled("act_regu", state)
        check_no_tensor_parallelism("act_regu", state)
        find_sites(state.model)
        self._hooks = _Hooks()
        state.callbacks.append(self._hooks)

    def _on_fit_start(self, state: State, logger: Logger) -> None:
        """Attach to the model as it is now, wrapped."""
        groups = (site.group.assessed_by or site.group for site in find_sites(state.model))
        self._groups = list({group.name: group for group in groups}.values())
        self._hooks.attach(self, self._groups)

    def _on_before_train_batch(self, state: State, logger: Logger) -> None:
        """Count the samples of all ranks; again when a batch is tried anew after an OOM."""
        if not isinstance(state.batch, Mapping) or "input_ids" not in state.batch:
            raise ValueError(
                f"train_loader: got batches of type {type(state.batch).__name__} without "
                "`input_ids`, allowed with act_regu: mappings with them, as llm-foundry's loaders "
                "give them"
            )
        self._padded, self._is_packed = look_at(state.batch)
        counted = state.device.tensor_to_device(torch.tensor(_count_samples(state.batch)))
        self._samples = max(1, int(sum_over_ranks(counted)))
        # The ranks' gradients are averaged, so that each has to bring world_size times its part.
        self._weight = self.coefficient * world_size() / (self._samples * len(self._groups))
        self._penalties, self.layout, self._passes = [], None, 0

    def _on_before_forward(self, state: State, logger: Logger) -> None:
        mask, packed = attention_mask(state.batch), None
        if self._is_packed:
            packed = find_samples(state.batch["sequence_id"], mask)
        self.layout = Layout(mask, self._padded, packed, self._weight)
        self._passes += 1

    def _on_after_backward(self, state: State, logger: Logger) -> None:
        self.layout = None

    def _on_after_train_batch(self, state: State, logger: Logger) -> None:
        wanted = self._passes * len(self._groups)
        if len(self._penalties) != wanted:
            raise RuntimeError(
                f"act_regu: penalised were {len(self._penalties)} activations of a batch, needed: "
                f"{wanted}. torch.compile may go on with code of an earlier run that had no "
                "act_regu: call torch.compiler.reset() before the Trainer is built, or leave "
                "compile_config out"
            )
        total = sum_over_ranks(torch.stack(self._penalties).sum())
        penalty = float(total) / (self._samples * len(self._groups))
        logger.log_metrics({"act_regu/penalty": penalty})


class _Hook:
    """On the projection that reads a group's units: hands on the same activation, penalised."""

    def __init__(self, owner: ActRegu, unit_size: int):
        self._owner, self._unit_size = owner, unit_size

    @torch.compiler.disable
    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        layout = self._owner.layout
        if layout is None:
            return None
        activation, deviations = Penalised.apply(inputs[0], self._unit_size, layout)
        # -1: not inside a backward pass, so not a recomputation. The only way torch offers.
        if torch._C._current_graph_task_id() == -1:
            self._owner.collect(deviations)
        return (activation, *inputs[1:])


class _Hooks(Callback):
    """Those of a trainer, which are removed at the end of a fit, or when it closes after an error.

    With the layout of a batch that failed they would penalise a run without the method.
    """

    def __init__(self):
        self._handles: list[RemovableHandle] = []

    def attach(self, owner: ActRegu, groups: list[Group]) -> None:
        """Hook the groups, in place of any hooks that a trainer has left whose fit failed."""
        for group in groups:
            hooks = group.probe._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
                del hooks[key]
            hook = _Hook(owner, group.unit_size)
            self._handles.append(group.probe.register_forward_pre_hook(hook))

    def close(self, state: State, logger: Logger) -> None:
        """Remove these hooks, and no others."""
        while self._handles:
            self._handles.pop().remove()

    fit_end = close


def _count_samples(batch: Mapping[str, Any]) -> int:
    """Samples of a batch with a token that counts."""
    mask, ids = attention_mask(batch), sequence_ids(batch)
    if ids is not None:
        return int(find_samples(ids, mask).valid.sum())
    return len(batch["input_ids"]) if mask is None else int(mask.any(dim=1).sum())
