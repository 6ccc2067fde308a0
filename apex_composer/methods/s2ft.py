"""S2FT: randomly chosen heads and channels are trained, nothing else."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from apex_composer import settings
from apex_composer.extras import needing

with needing("S2FT"):
    from composer.core import State
    from composer.loggers import Logger

from apex_composer.methods.method_checks import check_known
from apex_composer.model.sites import Site
from apex_composer.trainer.algorithm import APEX
from apex_composer.trainer.resumed_rates import lay_out_stages

PROJECTIONS = ("all", "output")


class S2FT(APEX):
    """Structured sparse fine-tuning (arXiv 2412.06289): rows and columns of random units.

    In every layer some heads and FFN channels are drawn once for the run, and with S their indices
    along a weight's axis, W[S] is trained by AdamW and the rest of the model is frozen:
        W[S] <- AdamW(W[S], dLoss/dW[S]),  all other weights as they are.

    It is `apex` with `trainable: selected`, without operators and with random units: what it logs
    and refuses is named apex, its state in checkpoints S2FT. Two groups of units of one size are
    drawn, so there is an even number of them in every layer; that all layers have the same number
    is our choice. Whole gradients are made, one weight's at a time: the paper's partial
    backpropagation, which saves time and memory, is not built.

    Args:
        trainable_share: trained parameters over all, met from below. Default 0.024, that of LoRA
            of rank 64.
        projections: `all` that a unit has weights in: its rows of queries, keys and values, or
            gate and up, and its columns of output, or down; `output`: these columns only. Which
            of them are trained is our choice. Default `all`.
        targets: which kinds of units are drawn: `head`, `channel`. Default both.
        kv_heads: `auto`, `expand` or `skip`, see `Expander`. Default `auto`.
        seed: an integer of 0 or more that the units are drawn with; default the run's.

    Raises:
        ValueError: for a setting out of range.
        TypeError: for an unknown setting.
    """

    def __init__(
        self,
        *,
        trainable_share: float = 0.024,
        projections: str = "all",
        targets: Sequence[str] = settings.TARGETS,
        kv_heads: str = "auto",
        seed: int | None = None,
        **unknown: Any,
    ):
        check_known("s2ft", unknown, S2FT)
        settings.check_choice("projections", projections, PROJECTIONS)
        settings.check_positive("trainable_share", trainable_share, float)
        self.projections = projections
        super().__init__(
            stages=1,
            assessment={"method": "random"},
            expansion=False,
            trainable="selected",
            trainable_share=trainable_share,
            targets=targets,
            kv_heads=kv_heads,
            seed=seed,
        )

    def __repr__(self) -> str:
        return f"S2FT(trainable_share={self.trainable_share!r}, projections={self.projections!r})"

    def find_sites(self, model: nn.Module) -> list[Site]:
        """The weights of a model that it acts on."""
        found = super().find_sites(model)
        if self.projections == "all":
            return found
        return [site for site in found if site.module is site.group.probe]

    def _on_fit_start(self, state: State, logger: Logger) -> None:
        """A resumed run may be longer or shorter: its only stage does not depend on its end."""
        if self._loaded is not None:
            stages = lay_out_stages(self.stages, state).state_dict()
            self._loaded = {**self._loaded, "stages": stages}
        super()._on_fit_start(state, logger)

    def _on_before_forward(self, state: State, logger: Logger) -> None:
        """Nothing is assessed."""
