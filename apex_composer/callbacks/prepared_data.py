"""The callback `prepared_data`: data that was prepared for another run is refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apex_composer.callbacks.finetuning_checks import check_examples
from apex_composer.data_prep.tokens.tokenizer import hash_backend
from apex_composer.data_prep.write.manifest import check_manifest
from apex_composer.extras import needing

with needing("PreparedData"):
    from composer.core import Callback, State
    from composer.loggers import Logger


class PreparedData(Callback):
    """Refuses data that was prepared for another tokenizer, vocabulary or sequence length.

    It refuses also a cache that was filled before the data at its address were prepared anew.
    llm-foundry's callback `prepared_data`. It compares the manifest that `apex-composer prep`
    leaves beside its shards, here or in the remote store, with the run: training and evaluation
    data. Shards without a manifest pass. What the trainer is built with is compared before a
    checkpoint is loaded, what comes with `fit()` before the first batch. Instruction data of
    `apex-composer prep-instruct` are compared with the configuration, before they are read.

    Args:
        train_config: configuration of the run; llm-foundry passes it.

    Raises:
        ValueError: something does not fit; the message names all of it.
    """

    def __init__(self, train_config: Mapping[str, Any] | None = None) -> None:
        check_examples(train_config or {})
        self._checked: list[Any] = []

    def before_load(self, state: State, logger: Logger) -> None:
        """Compare what the trainer was built with; at `fit_start`, what came with `fit()`."""
        self.check_fit(state)

    fit_start = before_load

    def check_fit(self, state: State) -> None:
        """Compare every stream's manifest that was not yet with the run's tokenizer and model."""
        model = getattr(state.model, "module", state.model)
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None:
            return
        # Of a slow one only its size and the length of the sequences can be compared.
        backend = getattr(tokenizer, "backend_tokenizer", None)
        known_hash = None if backend is None else hash_backend(backend.to_str())
        evaluated = [evaluator.dataloader.dataloader for evaluator in state.evaluators]
        for loader in (state.train_dataloader, *evaluated):
            dataset = getattr(loader, "dataset", None)
            if any(dataset is checked for checked in self._checked):
                continue
            for stream in getattr(dataset, "streams", ()):
                split = getattr(stream, "split", None) or ""
                check_manifest(
                    Path(stream.local) / split,
                    known_hash,
                    model.model.config.vocab_size,
                    dataset.max_seq_len,
                    remote=stream.remote and f"{stream.remote.rstrip('/')}/{split}".rstrip("/"),
                )
            self._checked.append(dataset)
