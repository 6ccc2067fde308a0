"""EMA: evaluations and checkpoints see an average of the weights, training its own ones."""

from apex_composer.extras import needing

with needing("EMA"):
    from composer.algorithms import EMA as ComposersEMA
    from composer.core import Event, State
    from composer.loggers import Logger

import torch
from torch import nn

from apex_composer.model.sites import clean_name


class EMA(ComposersEMA):
    """Composer's EMA of the trained weights, and what it does not see.

        average <- s average + (1 - s) weights,  s = 2^(-update_interval / half_life)

    Beside Composer's own: models exported by `hf_checkpointer` hold the average as the run's
    checkpoints do; an average by epochs is of the weights, also where a checkpoint has been saved
    in the epoch's last batch; constants in buffers are left alone, instead of being averaged until
    they are others (integers lose 1 by rounding); a run of one process goes on from DDP's
    checkpoint. What cannot be averaged is refused when the trainer is built.

    Args: those of composer.algorithms.EMA, of them `half_life` (default `1000ba`) and
        `update_interval` (default 1 of its unit); `smoothing` (s itself) with `half_life: null`.

    Raises:
        ValueError: for a setting out of range, at once; for sharded or low-precision weights, when
            the trainer is built. `apex` refuses it, too, where rows are trained.
    """

    half_life = None  # Composer's looks for it where only `smoothing` is given

    def match(self, event: Event, state: State) -> bool:
        """As Composer's, and where a model is exported."""
        saves = event in self.checkpoint_events and self.ema_started and _exports(state, event)
        return super().match(event, state) or saves

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """As Composer's, on weights alone, and on those of training when the average moves."""
        if event == Event.INIT:
            _check(state)
        elif event == self.update_event:
            self._ensure_training_weights_active(state)
        elif event in self.move_device_events:
            self._follow_names(state.model)
        super().apply(event, state, logger)
        self.ema_model.named_buffers_dict = {}

    def _follow_names(self, model: nn.Module) -> None:
        """DDP puts a prefix before names, and weights of other names would not be averaged."""
        names = {clean_name(name): name for name, _ in model.named_parameters()}
        held = self.ema_model.named_parameters_dict.items()
        self.ema_model.named_parameters_dict = {names[clean_name(n)]: own for n, own in held}


def _exports(state: State, event: Event) -> bool:
    """Whether llm-foundry's callback saves a model."""
    exporters = [c for c in state.callbacks if type(c).__name__ == "HuggingFaceCheckpointer"]
    return any(exporter.check_interval(state, event) for exporter in exporters)


def _check(state: State) -> None:
    for setting in ("fsdp_config", "tp_config"):
        if getattr(state, setting) is not None:
            raise ValueError(
                f"algorithms: got ema with {setting}, allowed: one process, or DDP. Composer's EMA "
                f"copies the weights before they are sharded. Remove one of the two; without ema, "
                "`apex-composer merge` averages checkpoints"
            )
    for name, parameter in state.model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"algorithms: got ema, and {name} is trained in {parameter.dtype}, allowed: "
                "float32. The average would round its small changes away: leave "
                "`master_weights_dtype` out (and set precision: amp_bf16 for the compute)"
            )
