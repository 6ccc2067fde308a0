"""What gmt and rmt share: the gradients of a batch, masked before they are clipped and used."""

import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

from apex_composer.extras import needing

with needing("gmt and rmt"):
    from composer.algorithms import GradientClipping
    from composer.core import Algorithm, Event, State
    from composer.loggers import Logger

from apex_composer.methods.method_checks import (
    check_no_expansion,
    check_no_tensor_parallelism,
    check_once,
    check_resumed,
    check_share,
    check_unscaled,
)
from apex_composer.model.sites import clean_name

log = logging.getLogger(__name__)


class Part(NamedTuple):
    """What this rank holds of a parameter's gradient: all of it, or some of its rows.

    Attributes:
        name: the parameter's, without wrappers' prefixes.
        gradient: a view of it; writing changes the gradient.
        start: place of its first entry among those of the whole, row by row.
        total: entries of the whole.
        group: ranks that hold the others, in the order of their parts; None: it is the whole.
    """

    name: str
    gradient: Tensor
    start: int
    total: int
    group: ProcessGroup | None


def count_kept(entries: int, share: float) -> int:
    """How many entries of a tensor a share is: rounded, halves up, one at least."""
    return max(1, int(share * entries + 0.5))


def gradient_parts(model: nn.Module) -> list[Part]:
    """The gradients that there are, in the model's order.

    Raises:
        ValueError: for one that is cut otherwise than FSDP2 cuts, by rows.
    """
    named = ((clean_name(name), p.grad) for name, p in model.named_parameters())
    return [
        _sharded(name, gradient)
        if isinstance(gradient, DTensor)
        else Part(name, gradient, 0, gradient.numel(), None)
        for name, gradient in named
        if gradient is not None
    ]


def _sharded(name: str, gradient: DTensor) -> Part:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = gradient.device_mesh, gradient.placements
    cut = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if len(cut) != 1 or placements[cut[0]] != ShardPlacement(0):
        raise ValueError(
            f"{name} has a gradient placed as {tuple(placements)}, allowed: FSDP2's, cut by rows"
        )
    _, offset = compute_local_shape_and_global_offset(gradient.shape, mesh, placements)
    start = offset[0] * gradient.shape[1:].numel()
    return Part(name, gradient.to_local(), start, gradient.numel(), mesh.get_group(cut[0]))


class GradientMask(Algorithm):
    """Keeps a share of the entries of every gradient and sets the others to zero.

    At AFTER_TRAIN_BATCH, when all microbatches are accumulated and the ranks have added up, and
    before any GradientClipping of the run: the norm that is clipped is that of what is left.

    Args:
        share: of the entries that is kept.

    Raises:
        ValueError: for a share out of (0, 1).
    """

    name: str

    def __init__(self, share: float):
        self.share = check_share(self.name, share)
        self._told = False

    def match(self, event: Event, state: State) -> bool:
        """See `apply`."""
        return event in (Event.INIT, Event.FIT_START, Event.AFTER_TRAIN_BATCH)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Refuse what cannot be; tell the share; mask the gradients of a batch."""
        if event == Event.INIT:
            self._check(state)
            _put_before_clipping(state, self)
        elif event == Event.FIT_START:
            self._told = False
        else:
            parts = gradient_parts(state.model)
            self._tell(parts, state, logger)
            for part, kept in self.masks(parts, state):
                part.gradient.masked_fill_(~kept, 0)

    @abstractmethod
    def masks(self, parts: Sequence[Part], state: State) -> Iterator[tuple[Part, Tensor]]:
        """Which entries of each part are kept, bool, of its gradient's shape."""

    def settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with its checkpoint."""
        return {"share": self.share}

    def state_dict(self) -> dict[str, Any]:
        """The settings."""
        return {**super().state_dict(), "settings": self.settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse other settings than the checkpoint's."""
        check_resumed(self.name, state["settings"], self.settings())

    def _check(self, state: State) -> None:
        check_once(self.name, state, GradientMask)
        check_unscaled(self.name, state)
        check_no_tensor_parallelism(self.name, state)
        check_no_expansion(
            self.name, "maps gradients to its operators' (or has some of its own)", state
        )
        if state.fsdp_config_version == 1:
            raise ValueError(
                f"fsdp_config: got FSDP1, which gives no gradients of single weights, allowed with "
                f"{self.name}: one process, DDP, FSDP2 (FSDP_VERSION=2)"
            )

    def _tell(self, parts: Sequence[Part], state: State, logger: Logger) -> None:
        """Once, of the gradients that there are: images' encoders, say, may have none."""
        if self._told:
            return
        self._told = True
        trained = sum(count_kept(part.total, self.share) for part in parts)
        total = sum(parameter.numel() for parameter in state.model.parameters())
        log.info("%s: %d of %d parameters are trained in a batch", self.name, trained, total)
        logger.log_metrics({f"{self.name}/trained_share": trained / total})


def _put_before_clipping(state: State, mask: GradientMask) -> None:
    """Last in the list is first at AFTER_TRAIN_BATCH (composer's `passes.set_filo_order`)."""
    if any(isinstance(algorithm, GradientClipping) for algorithm in state.algorithms):
        state.algorithms = [a for a in state.algorithms if a is not mask] + [mask]
