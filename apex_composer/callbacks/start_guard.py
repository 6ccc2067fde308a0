"""The callback `start_guard`: what would ruin a run is found before its first optimizer step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apex_composer.callbacks.adapter_checks import check_adapters
from apex_composer.callbacks.finetuning_checks import check_packing
from apex_composer.callbacks.flops_per_batch import give, read_plain, take_back
from apex_composer.callbacks.start_checks import (
    DEFAULT_MARGIN,
    check_attention,
    check_batches,
    check_context,
    check_disk,
    check_loss,
    check_vocabulary,
    count_checkpoints,
    tell_unlearned_eos,
)
from apex_composer.extras import needing
from apex_composer.model.sites import clean_name
from apex_composer.model.trained_parts import Roles
from apex_composer.settings import check_finite, check_keys
from apex_composer.trainable.shares import Share

with needing("StartGuard"):
    from composer.callbacks import CheckpointSaver, SpeedMonitor
    from composer.core import Callback, State
    from composer.loggers import Logger
    from composer.utils import dist
    from composer.utils.file_helpers import format_name_with_dist

# A negative one would let untrained weights pass a check that is there to find them.
_MARGINS = "a number of 0 or more, or null for no check"


class StartGuard(Callback):
    """Checks batch sizes, context, vocabulary, packing, adapters, disk and the first loss.

    Before data are read: finetuning loaders must not pack examples where they would see each other,
    and checkpoints and exports of adapters (`model.peft_config`) must hold all that changes.
    When the trainer is built: the global batch over the ranks and microbatches, the context length
    against the model's, soft-capped attention against its implementation (sdpa has no cap), the
    tokenizer's size against the model's, and the disk for all checkpoints that the run will keep; a
    tokenizer whose eos the loss leaves out is warned of. In the first microbatch after every start,
    if the YAML says `model.pretrained: true`: the loss must be well below that of untrained
    weights.
    What was prepared with `apex-composer` is compared with the run by `prepared_data`.

    A model of a known architecture (docs/models.md) that has no `flops_per_batch` gets one for the
    time of training where the run has a speed_monitor, so that this logs
    `throughput/device/flops_per_sec` and, on GPUs that it knows, `throughput/device/mfu`. What it
    counts: `apex_composer.model.flops`. For others a line in the log says that there will be none,
    and why.

    Args:
        train_config: configuration of the run; llm-foundry passes it.
        margin: least distance, in nats, of the first loss below ln(vocabulary); None for no check.
            Default 1.0.

    Raises:
        ValueError: margin is no finite number of 0 or more; packed examples would see each other;
            a checkpoint or an export would lose something.
        TypeError: for unknown settings.
    """

    def __init__(
        self,
        train_config: Mapping[str, Any] | None = None,
        margin: float | None = DEFAULT_MARGIN,
        **unknown: Any,
    ):
        check_keys("start_guard", unknown, ("margin",))
        if margin is not None:
            margin = check_finite("start_guard: margin", margin, _MARGINS, lowest=0.0)
        self.margin = margin
        self._config = train_config or {}
        self._sizes: dict[str, int] = {}  # of all parameters by name
        check_packing(self._config)  # here, for llm-foundry reads the data before INIT
        check_adapters(self._config)
        self._roles: Roles | None = None  # where FLOPs can be counted
        self._flops_are_due = False
        self._loss_is_due = bool((self._config.get("model") or {}).get("pretrained"))

    def init(self, state: State, logger: Logger) -> None:
        """Check what needs neither weights nor data."""
        batch = self._config.get("global_train_batch_size")
        if batch is not None:
            microbatch = self._config.get("device_train_microbatch_size", "auto")
            check_batches(batch, dist.get_world_size(), microbatch)
        model_config = _model_config(state)
        if self._config.get("max_seq_len") is not None:
            check_context(self._config["max_seq_len"], model_config)
        check_attention(model_config)
        tokenizer = getattr(state.model, "tokenizer", None)
        if tokenizer is not None and hasattr(model_config, "vocab_size"):
            check_vocabulary(len(tokenizer), model_config.vocab_size)
            tell_unlearned_eos(self._config, tokenizer)
        # Before FSDP shards them.
        self._sizes = {clean_name(name): p.numel() for name, p in state.model.named_parameters()}
        if any(isinstance(callback, SpeedMonitor) for callback in state.callbacks):
            self._roles = read_plain(state.model)

    def before_load(self, state: State, logger: Logger) -> None:
        """Check the disk: at INIT it is not known yet what is trained."""
        saver = next((c for c in state.callbacks if isinstance(c, CheckpointSaver)), None)
        known = self._config.get("global_train_batch_size") is not None
        if saver is not None and known and dist.get_global_rank() == 0:
            folder = Path(format_name_with_dist(saver.folder, state.run_name))
            width = next(state.model.parameters()).element_size()
            rows, trained = _trained_in_rows(state), self._trained(state)
            wrapped = getattr(state.model, "module", state.model)
            adapters = getattr(wrapped, "using_peft", False) and wrapped.should_save_peft_only
            saved = trained if adapters else sum(self._sizes.values())
            sizes = saved, trained if rows is None else rows, width
            copied = rows is not None
            check_disk(folder, count_checkpoints(self._config, *sizes, copied=copied))

    def _trained(self, state: State) -> int:
        """How many parameters have gradients."""
        named = [(clean_name(n), p) for n, p in state.model.named_parameters() if p.requires_grad]
        return sum(self._sizes.get(name, p.numel()) for name, p in named)

    def fit_start(self, state: State, logger: Logger) -> None:
        """FLOPs are counted for every fit and epoch: other weights may be frozen."""
        self._flops_are_due = self._roles is not None

    epoch_start = fit_start  # Composer's layer_freezing freezes more at an epoch's end

    def batch_start(self, state: State, logger: Logger) -> None:
        """Count FLOPs, once all algorithms and callbacks have frozen what they freeze."""
        if self._flops_are_due:
            self._flops_are_due = False
            give(state.model, self._roles, state.batch)

    def close(self, state: State, logger: Logger) -> None:
        """Leave the model as it was found."""
        if self._roles is not None:
            take_back(state.model)

    fit_end = close  # another Trainer may train other weights before this one is closed

    def after_loss(self, state: State, logger: Logger) -> None:
        """Check the first microbatch's loss; every rank its own."""
        if not self._loss_is_due or self.margin is None:
            return
        self._loss_is_due = False
        loss = state.loss.get("total") if isinstance(state.loss, dict) else state.loss
        model_config = _model_config(state)
        if loss is not None and not isinstance(loss, tuple) and hasattr(model_config, "vocab_size"):
            check_loss(float(loss.detach().mean()), model_config.vocab_size, self.margin)


def _trained_in_rows(state: State) -> int | None:
    """How many parameters are trained, where apex trains rows only; None for all."""
    shares = [getattr(algorithm, "share", None) for algorithm in state.algorithms]
    return next((share.trained for share in shares if isinstance(share, Share)), None)


def _model_config(state: State) -> Any:
    """The configuration of a language model, below DDP and Composer's own wrapper."""
    wrapped = getattr(state.model, "module", state.model)
    return getattr(getattr(wrapped, "model", wrapped), "config", None)
