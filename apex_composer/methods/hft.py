"""Half fine-tuning: half of every layer's matrices are frozen."""

import logging
import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from apex_composer.extras import needing

with needing("hft"):
    from composer.core import Algorithm, Callback, Event, State
    from composer.loggers import Logger

from apex_composer.assessment.selection import seeded_generator
from apex_composer.methods.method_checks import (
    check_known,
    check_no_expansion,
    check_once,
    check_resumed,
    check_share,
)
from apex_composer.model.find_sites import find_sites
from apex_composer.model.sites import Site, clean_name
from apex_composer.settings import check_not_negative
from apex_composer.sharding.shards import reshard
from apex_composer.trainer.run_checks import frozen_by_callback

log = logging.getLogger(__name__)

_NORMS = "norms"


class HFT(Algorithm):
    """Trains half of the matrices of every layer, drawn at random by kind, and freezes the others.

    Of a Llama's layer 2 of 4 attention matrices, 2 of 3 FFN matrices in one half of the layers and
    1 of 3 in the other, and 1 of 2 norms; embeddings, output head and whatever else is outside of
    the layers are trained. That is 52 % of LLaMA-2-7B.

    Our choices, where the source is silent or we could not read it: a bias belongs to its matrix; a
    fused projection (queries, keys and values; gate and up) is one matrix, so that the share of
    *numbers* that are trained is half on average only, and is logged; another share than a half is
    shared out alike, a kind's number being rounded over all layers. Where the source speaks of a
    new draw for every round of training, a round is a run here: frozen parameters have to be known
    before DDP and FSDP wrap the model and have no optimizer state. For the next round start a run
    from the weights (load_weights_only: true) with another seed.

    What is frozen does not move by a bit, has no gradient and no optimizer state, and is given back
    when the trainer closes.

    Source: Half Fine-Tuning, https://arxiv.org/abs/2404.18466; arXiv 2505.24241, A.2.

    Args:
        share: of the matrices of each kind that are trained, in (0, 1). Default 0.5.
        seed: an integer of 0 or more, for the draw. Default: the run's.

    Raises:
        ValueError: for a share or a seed out of range; at INIT for an unknown architecture, a layer
            with matrices of other kinds, parameters that are frozen already, and beside an apex
            that trains by itself; a resumed run's, for another share or seed.
        TypeError: for an unknown setting.
    """

    def __init__(self, *, share: float = 0.5, seed: int | None = None, **unknown: Any):
        check_known("hft", unknown, HFT)
        self.share = check_share("hft", share)
        self.seed = None if seed is None else check_not_negative("hft: seed", seed)
        self._used: dict[str, Any] = {}  # what the draw was made with
        self._trained = self._total = 0

    def match(self, event: Event, state: State) -> bool:
        """See `apply`."""
        return event in (Event.INIT, Event.FIT_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Freeze before the model is wrapped; log what is trained."""
        if event == Event.INIT:
            self._freeze(state, logger)
        else:
            share = self._trained / self._total
            metrics = {"hft/trained_parameters": self._trained, "hft/trained_share": share}
            logger.log_metrics(metrics)

    def state_dict(self) -> dict[str, Any]:
        """Share and seed of the draw."""
        return {**super().state_dict(), "settings": self._used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse a checkpoint of another draw."""
        check_resumed("hft", state["settings"], self._used)

    def _freeze(self, state: State, logger: Logger) -> None:
        check_once("hft", state, HFT)
        check_no_expansion("hft", "trains what hft freezes", state)
        seed = state.rank_zero_seed if self.seed is None else self.seed
        self._used = {"share": self.share, "seed": seed}
        sites = find_sites(state.model)
        _check_unfrozen(state.model)
        frozen = [p for module in untrained(sites, self.share, seed) for p in _own(module)]
        for parameter in frozen:
            parameter.requires_grad_(False)
        state.callbacks.append(_GiveBack(state, sites, frozen))
        self._total = sum(p.numel() for p in state.model.parameters())
        still = {id(p) for p in frozen} | frozen_by_callback(state).keys()
        self._trained = sum(p.numel() for p in state.model.parameters() if id(p) not in still)
        told = (
            f"{self._trained:,} of {self._total:,} parameters "
            f"({self._trained / self._total:.1%}), drawn by seed {seed}"
        )
        log.info("hft: trained are %s", told)
        logger.log_hyperparameters({"hft/trained": told})


def untrained(sites: Sequence[Site], share: float, seed: int) -> Iterator[nn.Module]:
    """The projections and norms that are frozen, kind by kind and layer by layer.

    Args:
        sites: those of the plain model.
        share: of each kind that is trained.
        seed: of the draw.
    """
    layers = [_kinds(name, layer, sites) for name, layer in _layers(sites)]
    for kind in ("head", "channel", _NORMS):
        members = [layer[kind] for layer in layers]
        generator = seeded_generator(seed, "hft", kind)
        drawn = draw([len(own) for own in members], share, generator)
        for own, trained in zip(members, drawn, strict=True):
            yield from (module for place, module in enumerate(own) if place not in trained)


def draw(sizes: Sequence[int], share: float, generator: torch.Generator) -> list[list[int]]:
    """Places of the members that are trained in every layer.

    Every layer gets share * size of them, rounded down; of the layers where that leaves something
    over, as many get one more as bring the sum to share * (sum of sizes), halves rounded up.

    Args:
        sizes: members of one kind, layer by layer.
        share: of the members that is trained.
        generator: chooses the layers, and the members in each.
    """
    wanted = [round(share * size, 9) for size in sizes]
    counts = [math.floor(number) for number in wanted]
    uneven = [layer for layer, number in enumerate(wanted) if number > counts[layer]]
    more = math.floor(sum(wanted) - sum(counts) + 0.5)
    for place in torch.randperm(len(uneven), generator=generator)[:more].tolist():
        counts[uneven[place]] += 1
    return [
        torch.randperm(size, generator=generator)[:count].tolist()
        for size, count in zip(sizes, counts, strict=True)
    ]


def _layers(sites: Sequence[Site]) -> Iterator[tuple[str, nn.Module]]:
    """The model's layers that have sites, and their names."""
    known = {site.module for site in sites}
    for name, module in sites[0].model.named_modules():
        if isinstance(module, nn.ModuleList):
            for place, layer in enumerate(module):
                if not known.isdisjoint(layer.modules()):
                    yield f"{name}.{place}", layer


def _kinds(name: str, layer: nn.Module, sites: Sequence[Site]) -> dict[str, list[nn.Module]]:
    """The modules of a layer that have parameters of their own, by kind."""
    units = {site.module: site.group.unit for site in sites}
    kinds: dict[str, list[nn.Module]] = {"head": [], "channel": [], _NORMS: []}
    for path, module in layer.named_modules():
        kind = units.get(module, _NORMS).replace("kv_head", "head")
        if kind == _NORMS and any(p.dim() > 1 for p in _own(module)):
            raise ValueError(
                f"{clean_name(f'{name}.{path}')} holds a matrix that is neither of attention nor "
                "of the FFN as the table in apex_composer/model/architectures.py knows them, "
                "allowed with hft: layers of such matrices and norms. Train the plain model (no "
                "adapters)"
            )
        if _own(module):
            kinds[kind].append(module)
    return kinds


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


def _check_unfrozen(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            raise ValueError(
                f"{clean_name(name)} is frozen already, allowed with hft: a model that is trained "
                "as a whole, of which hft freezes a part itself. Unfreeze it (no peft_config), or "
                "close the Trainer that has frozen it"
            )


class _GiveBack(Callback):
    """Unfreezes at the end of a run what it has frozen at its beginning.

    Should the trainer fail before it is built, that is when its state is collected.

    Args:
        state: the run's, before wrapping.
        sites: its model's.
        frozen: of the model's parameters.
    """

    def __init__(self, state: State, sites: Sequence[Site], frozen: Iterable[nn.Parameter]):
        own = {id(parameter) for parameter in frozen}
        self._model, self._sites = state.model, sites
        # Wrapping may replace the parameters.
        self._names = {clean_name(n) for n, p in self._model.named_parameters() if id(p) in own}
        weakref.finalize(state, self.close).atexit = False

    def close(self, state: State | None = None, logger: Logger | None = None) -> None:
        """Leave a model as it was found."""
        reshard(self._sites)
        for name, parameter in self._model.named_parameters():
            if clean_name(name) in self._names:
                parameter.requires_grad_(True)
        self._names = set()
