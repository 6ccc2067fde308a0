"""EMA: evaluations and checkpoints see an average of the weights, training its own ones."""

from typing import Any

from apex_composer.extras import needing

with needing("EMA"):
    from composer.algorithms import EMA as ComposersEMA
    from composer.core import Event, State
    from composer.loggers import Logger

import torch
from torch import nn

from apex_composer.methods.method_checks import check_known, check_once
from apex_composer.model.sites import clean_name
from apex_composer.settings import is_number
from apex_composer.trainer.stages import parse_duration


class EMA(ComposersEMA):
    """Composer's EMA of the trained weights, and what it does not see.

        average <- s average + (1 - s) weights,  s = 2^(-update_interval / half_life)

    Beside Composer's own: models exported by `hf_checkpointer` hold the average as the run's
    checkpoints do; an average by epochs is of the weights, also where a checkpoint has been saved
    in the epoch's last batch; constants in buffers are left alone, instead of being averaged until
    they are others (integers lose 1 by rounding); a run of one process goes on from DDP's
    checkpoint. What cannot be averaged is refused when the trainer is built.

    Behind a fit the model holds the average where its last batch has been saved, as the checkpoint
    does, and the weights of training elsewhere; a further fit goes on from the latter.

    Args:
        half_life: a Composer time string in ba or ep. Default `1000ba`.
        smoothing: s itself, in (0, 1), with `half_life: null`. Default None.
        ema_start: when the average begins, a Composer time string in ba, ep or dur. Default: at
            once.
        update_interval: between two averages, in the unit of `half_life`. Default 1 of it.

    Raises:
        ValueError: for a setting out of range, at once; for sharded or low-precision weights and a
            second ema, when the trainer is built. `relora` refuses it, too, and `apex` where rows
            are trained.
        TypeError: for an unknown setting.
    """

    half_life = None  # Composer's looks for it where only `smoothing` is given

    def __init__(
        self,
        *,
        half_life: str | None = "1000ba",
        smoothing: float | None = None,
        ema_start: str = "0dur",
        update_interval: str | None = None,
        **unknown: Any,
    ):
        check_known("ema", unknown, EMA)
        if (half_life is None) == (smoothing is None):
            raise ValueError(
                f"ema: smoothing: got {smoothing!r} with half_life: {half_life!r}, allowed: one of "
                "the two, and null for the other"
            )
        if half_life is not None:
            half_life = _check_time("half_life", half_life, ("ba", "ep"))
        elif not is_number(smoothing) or not 0 < smoothing < 1:
            raise ValueError(f"ema: smoothing: got {smoothing!r}, allowed: a number in (0, 1)")
        if update_interval is not None:
            units = ("ba", "ep") if half_life is None else (half_life[-2:],)
            update_interval = _check_time("update_interval", update_interval, units)
        ema_start = _check_time("ema_start", ema_start, ("ba", "ep", "dur"), zero=True)
        super().__init__(half_life, smoothing, ema_start, update_interval)

    def match(self, event: Event, state: State) -> bool:
        """As Composer's, and where a model is exported."""
        saves = event in self.checkpoint_events and self.ema_started and _exports(state, event)
        return super().match(event, state) or saves

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """As Composer's, on weights alone, and on those of training when the average moves."""
        if event == Event.INIT:
            _check(state)
            self.ema_started = self.ema_weights_active = False  # another trainer's, before
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


def _check_time(setting: str, value: Any, units: tuple[str, ...], zero: bool = False) -> str:
    """The time as a string; ValueError unless it is a time of these units."""
    try:
        time = parse_duration(setting, value, zero=zero)
        good = time.unit.value in units
    except ValueError:
        good = False
    if not good:
        raise ValueError(
            f"ema: {setting}: got {value!r}, allowed: a {'' if zero else 'positive '}Composer time "
            f"string in {', '.join(units)}, for example '10{units[0]}'"
        )
    return time.to_timestring()


def _exports(state: State, event: Event) -> bool:
    """Whether llm-foundry's callback saves a model."""
    exporters = [c for c in state.callbacks if type(c).__name__ == "HuggingFaceCheckpointer"]
    return any(exporter.check_interval(state, event) for exporter in exporters)


def _check(state: State) -> None:
    check_once("ema", state, ComposersEMA)
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
