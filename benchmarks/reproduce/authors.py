"""The operator as the authors' code has it, piece by piece: plain torch, by autograd.

    W_eff[N] = D_N W[N] + T W[P],   W_eff[P] = D_P W[P]

| piece | what the authors' code does |
|---|---|
| `start` | R is uniform in (-1/q, 1/q) instead of normal with variance 1/q |
| `order` | rows of N from the lowest score on, those of P from the highest; else as they lie |
| `blocks` | L and R are both k blocks of b x b, k the divisor of n = k b nearest to its root |
| `shared` | one T for v and o, one for gate, up and down, none for q and k |
| `diagonals` | D_N, one for v and o, one for gate, up and down; D_P of v, of gate, of up; else I |

Source: github.com/gccnlp/APEX, commits db1179a and 21df4c0; what else differs is in
docs/ambiguities.md. Without any piece this is the paper's operator as the package has it.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from reproduce.stage_facts import kind_facts
from torch import Tensor

from apex_composer import Expander
from apex_composer.assessment.selection import seeded_generator
from apex_composer.model.sites import Group, Site
from apex_composer.observe.ranks import entropy_rank
from apex_composer.operators.main_optimizer import followed
from apex_composer.ops.full_precision import bmm, full_float32
from apex_composer.ops.monarch import MonarchFactors, init_factors
from apex_composer.ops.reference import take

PIECES = ("start", "order", "blocks", "shared", "diagonals")
# Projections that have an operator in the authors' code, and those whose rows of P have factors.
MIXED = ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCALED = ("v_proj", "gate_proj", "up_proj")


@dataclass
class Place:
    """What acts on one weight, all rows as [n, d] whatever its axis.

    Attributes:
        site: of the weight.
        strong: indices of P, in the order in which T takes them.
        weak: indices of N, in the order in which T gives them.
        factors: L and R, which several places may share.
        weak_scale: D_N, [n], which several may share; None: I.
        strong_scale: D_P, [n]; None: I.
        base: W[P] and W[N].
    """

    site: Site
    strong: Tensor
    weak: Tensor
    factors: MonarchFactors
    weak_scale: Tensor | None
    strong_scale: Tensor | None
    base: list[Tensor]

    def effective(self, strong: Tensor, weak: Tensor) -> list[Tensor]:
        """W_eff[P] and W_eff[N] of W[P] and W[N]."""
        added = product(self.factors, strong)
        if self.weak_scale is not None:
            weak = weak * self.weak_scale.unsqueeze(1)
        if self.strong_scale is not None:
            strong = strong * self.strong_scale.unsqueeze(1)
        return [strong, weak + added]

    def read(self, matrix: Tensor) -> list[Tensor]:
        """Rows of P and of N of the weight, or of its gradient."""
        return [take(matrix, indices, self.site.axis) for indices in (self.strong, self.weak)]

    def write(self, matrix: Tensor, rows: Sequence[Tensor]) -> None:
        """Put rows of P and of N there."""
        axis = self.site.axis
        for indices, own in zip((self.strong, self.weak), rows, strict=True):
            matrix.index_copy_(axis, indices, own if axis == 0 else own.t())

    def trained(self) -> Iterator[Tensor]:
        """L, R and the factors of rows."""
        yield from self.factors
        yield from (scale for scale in (self.weak_scale, self.strong_scale) if scale is not None)


class AuthorsOperators:
    """Acts around an optimizer's steps as the package does: the weights are W_eff outside of them.

    Args:
        expander: selects units; it has no operators.
        optimizer: of the weights, all with one learning rate.
        pieces: of PIECES.
        lr_scale: learning rate of what is trained here over that of the weights.
    """

    def __init__(
        self,
        expander: Expander,
        optimizer: torch.optim.Optimizer,
        pieces: Sequence[str],
        lr_scale: float = 1.0,
    ):
        self._expander, self._main, self._lr_scale = expander, optimizer, lr_scale
        self._pieces, self.places = frozenset(pieces), list[Place]()
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def begin(self) -> None:
        """A stage: T = 0 and D = I on the weights as they are, for the units just selected."""
        shared: dict[Any, Any] = {}
        self.places = [self._place(site, shared) for site in self._sites()]
        trained = {id(own): own for place in self.places for own in place.trained()}
        for own in trained.values():
            own.requires_grad_()
        self._optimizer = torch.optim.AdamW(list(trained.values()), weight_decay=0.0)

    def end(self) -> None:
        """The weights hold W_eff: there is nothing to act on any more."""
        self.places = []

    def _sites(self) -> list[Site]:
        if "shared" not in self._pieces:
            return self._expander.sites
        return [site for site in self._expander.sites if _kind(site) in MIXED]

    def _place(self, site: Site, shared: dict[str, Any]) -> Place:
        strong, weak = self._rows(site)
        module = site.name.rsplit(".", 2)[0]
        owner = module if "shared" in self._pieces else site.name
        if owner not in shared:
            shared[owner] = self._fresh(len(strong), owner, site.weight)
        factors, weak_scale, strong_scale = shared[owner], None, None
        if "diagonals" in self._pieces and _kind(site) in MIXED:
            ones = torch.ones_like(strong, dtype=site.weight.dtype)
            weak_scale = shared.setdefault(f"{module} scale", ones)
            strong_scale = ones.clone() if _kind(site) in SCALED else None
        place = Place(site, strong, weak, factors, weak_scale, strong_scale, [])
        place.base = place.read(site.weight.detach())
        return place

    def _rows(self, site: Site) -> list[Tensor]:
        """Indices of P and of N."""
        units = self._expander.selections[site.group.name]
        if "order" in self._pieces:
            scores = _unit_scores(self._expander, site.group)
            units = [
                side[torch.sort(scores[side], descending=highest, stable=True).indices]
                for side, highest in zip(units, (True, False), strict=True)
            ]
        return [site.indices(side.to(site.weight.device)) for side in units]

    def _fresh(self, size: int, owner: str, like: Tensor) -> MonarchFactors:
        """L = 0 and R as it starts."""
        generator = seeded_generator(self._expander.seed, "factors", self._expander.stage, owner)
        left, right = init_factors(size, generator=generator)
        if "blocks" in self._pieces:
            left = torch.zeros(square_blocks(size))
            right = torch.randn(left.shape, generator=generator) / left.shape[-1] ** 0.5
        if "start" in self._pieces:
            right = (2 * torch.rand(right.shape, generator=generator) - 1) / right.shape[-1]
        return MonarchFactors(*(own.to(like.device, like.dtype) for own in (left, right)))

    def _before_step(self, *_: Any) -> None:
        """The weights become W, and their gradients those of W; what is trained here gets its."""
        with full_float32():
            for place in self.places:
                strong, weak = (rows.requires_grad_() for rows in place.base)
                gradient = place.site.weight.grad
                torch.autograd.backward(place.effective(strong, weak), place.read(gradient))
                place.write(gradient, [strong.grad, weak.grad])
                place.write(place.site.weight.detach(), [strong.detach(), weak.detach()])

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        """The optimizer has stepped on W: step on what is trained here, write W_eff."""
        self._optimizer.param_groups[0] |= followed(self._main.param_groups[0], self._lr_scale)
        self._optimizer.step()
        self._optimizer.zero_grad()
        with full_float32():
            for place in self.places:
                weight = place.site.weight.detach()
                place.base = place.read(weight)
                place.write(weight, place.effective(*place.base))

    @torch.no_grad()
    def facts(self) -> dict[str, Any]:
        """As `operator_facts`; and `scale_change`, the mean of |D - 1| over all D."""
        kinds, changes = defaultdict(list), []
        for place in self.places:
            strong, _ = place.base
            added = product(place.factors, strong).norm()
            _, weak = place.read(place.site.weight)
            matrix = product(place.factors, torch.eye(len(strong)).to(strong))
            rank = entropy_rank(torch.linalg.svdvals(matrix.float()))
            kinds[_kind(place.site)].append((float(added / weak.norm()), rank))
            scales = (place.weak_scale, place.strong_scale)
            changes += [float((own - 1).abs().mean()) for own in scales if own is not None]
        change = {"scale_change": sum(changes) / len(changes)} if changes else {}
        return kind_facts(kinds) | change


def product(factors: MonarchFactors, rows: Tensor) -> Tensor:
    """T X = Pm L Pm^T R X for any two block-diagonal factors of n rows.

    Args:
        factors: L [l, s, s] and R [r, t, t] with l s = r t = n.
        rows: X, [n, d].

    Returns:
        [n, d]; row number i l + j of R X is row i of L's block j, and so is it of T X.
    """
    left, right = factors
    middle = bmm(right, rows.unflatten(0, right.shape[:2])).flatten(0, 1)
    middle = middle.unflatten(0, (left.shape[1], left.shape[0])).transpose(0, 1)
    return bmm(left, middle).transpose(0, 1).flatten(0, 1)


def square_blocks(size: int) -> tuple[int, int, int]:
    """k blocks of b x b with k b = size, k the divisor nearest to the root, the smaller of two."""
    divisors = [k for k in range(1, size + 1) if size % k == 0]
    blocks = min(divisors, key=lambda k: abs(k - size**0.5))
    return blocks, size // blocks, size // blocks


def _unit_scores(expander: Expander, group: Group) -> Tensor:
    """What a group's units were selected by, [units] on the CPU."""
    scores = expander.ranked[(group.assessed_by or group).name]
    return scores.view(group.units, -1).sum(1).cpu()


def _kind(site: Site) -> str:
    return site.name.split(".")[-2]
