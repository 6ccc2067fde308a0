"""The callback `start_guard`: what would ruin a run is found before its first optimizer step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer.callbacks import CheckpointSaver
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from composer.utils.file_helpers import format_name_with_dist

from apex_composer.callbacks.disk import (
    Clock,
    check_disk,
    checkpoint_bytes,
    count_kept,
    count_saves,
    moments,
)
from apex_composer.callbacks.start_checks import (
    DEFAULT_MARGIN,
    check_batches,
    check_context,
    check_loss,
    check_vocabulary,
)
from apex_composer.settings import check_finite, check_keys

# Where Hugging Face's configurations and llm-foundry's MPT say how long a context may be.
_CONTEXT_NAMES = ("max_position_embeddings", "max_seq_len")
# A negative one would let untrained weights pass a check that is there to find them.
_MARGINS = "a number of 0 or more, or null for no check"


class StartGuard(Callback):
    """Checks batch sizes, context, vocabulary, disk and the first loss.

    When the trainer is built: the global batch over the ranks and microbatches, the context length
    against the model's, the tokenizer's size against the model's, and the disk for all checkpoints
    that the run will keep. In the first microbatch after every start, if the YAML says
    `model.pretrained: true`: the loss must be well below that of untrained weights.
    What was prepared with `apex-composer prep` is compared with the run by `prepared_data`.

    Args:
        train_config: the run's configuration; llm-foundry passes it.
        margin: how far, in nats, the first loss has to be below ln(vocabulary); None for no check.
            Default 1.0.

    Raises:
        ValueError: margin is no finite number of 0 or more.
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
        self._loss_is_due = bool((self._config.get("model") or {}).get("pretrained"))

    def init(self, state: State, logger: Logger) -> None:
        """Check what needs neither weights nor data."""
        batch = self._config.get("global_train_batch_size")
        if batch is not None:
            microbatch = self._config.get("device_train_microbatch_size", "auto")
            check_batches(batch, dist.get_world_size(), microbatch)
        model = _language_model(state)
        config = getattr(model, "config", None)
        length = self._config.get("max_seq_len")
        for name in _CONTEXT_NAMES if length is not None else ():
            check_context(length, getattr(config, name, None), name)
        tokenizer = getattr(state.model, "tokenizer", None)
        if tokenizer is not None and hasattr(config, "vocab_size"):
            check_vocabulary(len(tokenizer), config.vocab_size)
        if dist.get_global_rank() == 0:
            self._check_disk(state)

    def after_loss(self, state: State, logger: Logger) -> None:
        """Check the first microbatch's loss; every rank its own."""
        if not self._loss_is_due or self.margin is None:
            return
        self._loss_is_due = False
        loss = state.loss.get("total") if isinstance(state.loss, dict) else state.loss
        config = getattr(_language_model(state), "config", None)
        if loss is not None and not isinstance(loss, tuple) and hasattr(config, "vocab_size"):
            check_loss(float(loss.detach().mean()), config.vocab_size, self.margin)

    def _check_disk(self, state: State) -> None:
        saver = next((c for c in state.callbacks if isinstance(c, CheckpointSaver)), None)
        batch = self._config.get("global_train_batch_size")
        if saver is None or batch is None:
            return
        # llm-foundry's default where the YAML does not say.
        interval = self._config.get("save_interval", "1000ba")
        clock = Clock(batch, self._config["max_seq_len"])
        saves = count_saves(self._config["max_duration"], interval, clock)
        kept = count_kept(saves, saver.num_checkpoints_to_keep)
        if kept is None:
            return
        # Before FSDP shards them, so these are all parameters.
        parameters = sum(parameter.numel() for parameter in state.model.parameters())
        optimizer = moments((self._config.get("optimizer") or {}).get("name", ""))
        size = checkpoint_bytes(parameters, optimizer, weights_only=saver.weights_only)
        folder = Path(format_name_with_dist(saver.folder, state.run_name))
        existing = sum(path.stat().st_size for path in folder.glob("*.pt") if not path.is_symlink())
        check_disk(folder, kept, size, existing=existing)


def _language_model(state: State) -> Any:
    wrapped = getattr(state.model, "module", state.model)
    return getattr(wrapped, "model", wrapped)
