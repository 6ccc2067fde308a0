"""Training of some rows of a model: their gradients, their steps, and their way back into it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from apex_composer.assessment.selection import Selection
from apex_composer.distributed import world_size
from apex_composer.model.sites import Site
from apex_composer.operators.changes import versions
from apex_composer.operators.main_optimizer import param_group_places
from apex_composer.settings import check_same_members
from apex_composer.sharding.shards import Shard, find_shards, reshard
from apex_composer.trainable.check import Checked
from apex_composer.trainable.frozen import TakenOut, check_whole, freeze_others
from apex_composer.trainable.row_optimizer import (
    Moments,
    RowAdamW,
    check_main,
    moments_of,
    move_moments,
)
from apex_composer.trainable.rows import Part, Rows, carry, make_rows
from apex_composer.trainable.units import trained_units


class RowTraining:
    """The trained rows through the stages of a run.

    A weight's gradient lives until the trained rows' part of it is added to theirs, right after it
    was accumulated; under DDP, which reduces whole gradients, until the step.

    Args:
        trainable: `selected`, `half` or `disadvantageous`.
        found: the model's.

    Attributes:
        rows: of the running stage, by the site's name.
        optimizer: of the rows; None without rows, or a main optimizer to follow.
    """

    def __init__(self, trainable: str, found: Checked):
        self._trainable, self._filled, self._whole = trainable, found.share.filled, found.whole
        self.sites = found.trained
        self._groups_of_units = list({site.group.name: site.group for site in self.sites}.values())
        self._frozen: list[nn.Parameter] = []
        self.rows: dict[str, Rows] = {}
        self.optimizer: RowAdamW | None = None
        self._taken: TakenOut | None = None  # of the main optimizer
        self._handles: list[Any] = []
        self._by_parameter: dict[nn.Parameter, list[Part]] = {}
        self._written: list[tuple[int, ...]] = []  # versions of these
        self._moments: Moments = {}  # by copy, whether there is an optimizer or not

    def begin(self, selections: Mapping[str, Selection], seed: int, stage: int) -> None:
        """Copy the rows that a stage trains; those that stay keep their copies and moments.

        Args:
            selections: P and N of the groups that are selected from.
            seed: the run's.
            stage: its number.
        """
        groups = self._trainable, self._groups_of_units
        self._begin(trained_units(*groups, selections, self._filled, seed, stage))

    def _begin(self, units: Mapping[str, Tensor]) -> None:
        self.take_changes()
        self._silence()
        if self.optimizer is not None:
            self.optimizer.forget()
        before, self.rows, self.optimizer, self._by_parameter = self.rows, {}, None, {}
        sites = [site for site in self.sites if site.group.name in units]
        # Site by site, so that no more than one is held twice.
        for site, shards in zip(sites, find_shards(sites), strict=True):
            own = site, shards, units[site.group.name]
            self.rows[site.name] = self._copied(*own, before.pop(site.name, None))
        for part in (part for old in before.values() for part in old.parts):
            self._moments.pop(part.copy, None)
        self._listen()
        self._follow()

    def _copied(self, site: Site, shards: Sequence[Shard], units: Tensor, old: Rows | None) -> Rows:
        new = make_rows(site, shards, units)
        if old is not None:
            carry(old, new, [p.copy for p in old.parts], [p.copy for p in new.parts])
            move_moments(self._moments, old, new)
        return new

    def follow(self, main: Optimizer) -> None:
        """Take the sites' weights out of the main optimizer, whose settings the rows follow.

        Raises:
            ValueError: it does not train all that is to be trained, or as `check_main`, `freeze`.
        """
        check_main(main)
        param_group_places(self.sites, main)
        check_whole(self._whole, self._models()[0], main)
        self.freeze()
        self._taken = TakenOut(main, self.sites)
        self.take_changes()
        self._silence()
        self._listen()
        self._follow()

    def freeze(self) -> None:
        """Freeze what is not trained, until `remove`.

        Raises:
            ValueError: it is too late, or the model that reduces gradients is not known.
        """
        reshard(self.sites)
        frozen = [p for m in self._models() for p in freeze_others(m, self.sites, self._whole)]
        self._frozen += frozen
        sharded = any(isinstance(p, DTensor) for own in self.sites for p in own.parameters())
        if self._reduced() and frozen:
            raise ValueError(
                "trainable: DDP was told to wait for gradients of what is frozen now. Allowed: to "
                "call freeze_untrained(find_sites(model), ...) before the model is wrapped"
            )
        if world_size() > 1 and not self._reduced() and not sharded:
            raise ValueError(
                "trainable: there are several ranks, but the sites are those of a model that "
                "reduces no gradients. Allowed: find_sites(model) of the outermost model, wrapped "
                "by DDP or sharded by FSDP2"
            )

    def _reduced(self) -> bool:
        """Whether DDP reduces whole gradients, at the end of a backward pass."""
        modules = (module for model in self._models() for module in model.modules())
        return any(isinstance(module, DistributedDataParallel) for module in modules)

    def _models(self) -> list[nn.Module]:
        return list({id(s.model): s.model for s in self.sites if s.model is not None}.values())

    def _follow(self) -> None:
        rows, taken = list(self.rows.values()), self._taken
        if rows and taken is not None:
            self.optimizer = RowAdamW(rows, taken.main, taken.places, self._moments)

    def _listen(self) -> None:
        """Take gradients as soon as they are there, where they are not reduced as a whole later."""
        by_parameter: dict[nn.Parameter, list[Part]] = defaultdict(list)
        for part in self.parts():
            by_parameter[part.shard.parameter].append(part)
        self._by_parameter = dict(by_parameter)
        self._written = versions(self._by_parameter)
        if not self._reduced():
            self._handles = [
                parameter.register_post_accumulate_grad_hook(self._take)
                for parameter in self._by_parameter
            ]

    def _silence(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def _take(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            for part in self._by_parameter[parameter]:
                part.add_gradient(parameter.grad)
            parameter.grad = None

    def collect(self) -> None:
        """Take the gradients that are still whole (DDP); before they are clipped, or a step."""
        for parameter in self._by_parameter:
            self._take(parameter)

    def parts(self) -> list[Part]:
        """Of all rows: weights, and biases."""
        return [part for own in self.rows.values() for part in own.parts]

    def write(self) -> None:
        """Put all rows into the model."""
        for part in self.parts():
            part.write()
        self._written = versions(self._by_parameter)

    def take_changes(self) -> None:
        """What others have changed in the model since it was written holds for the rows, too."""
        if versions(self._by_parameter) != self._written:
            for part in self.parts():
                part.take_changes()
            self._written = versions(self._by_parameter)

    def clip_grad_norm(self, largest: float) -> Tensor:
        """Scale all gradients so that their norm together is at most the given one.

        Over the trained rows of dLoss/dW_eff and what is trained whole; all ranks call it.

        Args:
            largest: the norm that they may have.

        Returns:
            The norm before, a scalar tensor.
        """
        self.collect()
        rows = [part.copy.grad for part in self.parts() if part.copy.grad is not None]
        others = [parameter.grad for parameter in self._whole if parameter.grad is not None]
        sharded = {part.gathered.process_group for part in self.parts()} - {None}
        squares = _square_sum(rows, self.sites[0].weight.device)
        for group in sharded:
            torch.distributed.all_reduce(squares, group=group)
        for gradient in others:
            norm = torch.linalg.vector_norm(gradient, dtype=squares.dtype)
            squares += (norm.full_tensor() if isinstance(norm, DTensor) else norm).square()
        norm = squares.sqrt()
        # As torch.nn.utils.clip_grad_norm_.
        for gradient in [*rows, *others]:
            gradient.mul_((largest / (norm + 1e-6)).clamp(max=1.0).to(gradient.dtype))
        return norm

    def clip_grad_value(self, largest: float) -> None:
        """Cut all entries of these gradients off at the given size."""
        self.collect()
        for leaf in [*(part.copy for part in self.parts()), *self._whole]:
            if leaf.grad is not None:
                leaf.grad.clamp_(-largest, largest)

    def zero_grad(self) -> None:
        """Forget the rows' gradients, also those that are still whole."""
        for part in self.parts():
            part.copy.grad = part.shard.parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Units, copies and moments by the site's name, on the CPU (collective where sharded)."""
        self.take_changes()
        state = {}
        for name, own in self.rows.items():
            moments = [[part.whole(tensor) for tensor in self.moments(part)] for part in own.parts]
            rows = [part.whole(part.copy) for part in own.parts]
            state[name] = {"units": own.units.clone(), "rows": rows, "moments": moments}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the saved rows of a stage.

        Raises:
            ValueError: they are of other weights than this run trains.
        """
        check_same_members("trained weights", [*state], [site.name for site in self.sites])
        self.take_over(state)

    def take_over(self, state: Mapping[str, Any]) -> None:
        """Begin with saved rows, whatever is selected or drawn now; a next stage has them all."""
        saved = [(site.group.name, state[site.name]) for site in self.sites if site.name in state]
        self._begin({group: own["units"] for group, own in saved})
        for name, own in self.rows.items():
            pairs = zip(state[name]["rows"], state[name]["moments"], strict=True)
            for part, (rows, moments) in zip(own.parts, pairs, strict=True):
                for target, value in zip(
                    [part.copy, *self.moments(part)], [rows, *moments], strict=True
                ):
                    target.detach().copy_(part.own(value, target))

    def moments(self, part: Part) -> list[Tensor]:
        """Mean and mean square of the gradients of a part, and the steps of each of its rows."""
        return moments_of(self._moments, part.copy, part.axis)

    def remove(self) -> None:
        """Leave the gradients alone, and give the main optimizer its parameters back."""
        self._silence()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        if self._taken is not None:
            self._taken.give_back()
        self._taken, self._frozen = None, []


def _square_sum(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=device)
    for tensor in tensors:
        total += torch.linalg.vector_norm(tensor).double().square()
    return total
