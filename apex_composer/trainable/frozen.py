"""What is not trained: frozen in the model, and not in the main optimizer's hands."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from apex_composer.model.sites import Site
from apex_composer.settings import check_trainable
from apex_composer.trainable.check import check_model


def freeze_others(
    model: nn.Module, sites: Sequence[Site], whole: Iterable[nn.Parameter]
) -> list[nn.Parameter]:
    """Freeze all parameters but those of the sites and those that are trained as they are.

    Returns:
        Those that were not frozen before, to be given back.
    """
    kept = {id(p) for site in sites for p in site.parameters()} | {id(p) for p in whole}
    others = [p for p in model.parameters() if id(p) not in kept and p.requires_grad]
    for parameter in others:
        parameter.requires_grad_(False)
    return others


def freeze_untrained(sites: Sequence[Site], **settings: Any) -> None:
    """Freeze what an `Expander` with these settings does not train, before DDP wraps the model.

    Args:
        sites: those of the plain model.
        settings: `trainable`, `trainable_share`, `threshold`, `kv_heads` and `expansion`, those of
            the `Expander`: they tell what is trained.
    """
    trainable = settings.pop("trainable")
    share = check_trainable(trainable, settings.pop("trainable_share", None))
    threshold = settings.pop("threshold", 0.125)
    found = check_model(sites, threshold, **settings, trainable=trainable, trainable_share=share)
    freeze_others(sites[0].model, found.trained, found.whole)


def check_whole(whole: Iterable[nn.Parameter], model: nn.Module, main: Optimizer) -> None:
    """Refuse an optimizer that does not train what is trained as it is.

    Raises:
        ValueError: naming the first such parameter.
    """
    held = {id(parameter) for group in main.param_groups for parameter in group["params"]}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in whole:
        if id(parameter) not in held or not parameter.requires_grad:
            raise ValueError(
                f"{names[id(parameter)]} is not trained by the optimizer (frozen, or left out of "
                "it), but trainable: half trains embeddings and head as well. Unfreeze it and "
                "give it to the optimizer, or use trainable: selected"
            )


class TakenOut:
    """The sites' weights out of the main optimizer, which would train them, or keep state for them.

    Args:
        main: the optimizer. What is frozen stays in its param groups.
        sites: those of which rows are trained.

    Attributes:
        places: which param group every parameter was in.
    """

    def __init__(self, main: Optimizer, sites: Sequence[Site]):
        self.main = main
        self._groups = [list(group["params"]) for group in main.param_groups]
        self.places = {p: place for place, own in enumerate(self._groups) for p in own}
        taken = {id(parameter) for site in sites for parameter in site.parameters()}
        for group, own in zip(main.param_groups, self._groups, strict=True):
            group["params"] = [parameter for parameter in own if id(parameter) not in taken]

    def give_back(self) -> None:
        """Put them back where they were."""
        for group, own in zip(self.main.param_groups, self._groups, strict=True):
            group["params"] = own
