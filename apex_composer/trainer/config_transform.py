"""What llm-foundry loads from this package by entry point, besides the algorithm and the scheduler.

The transform below runs in every llm-foundry training of an environment that has this package
installed, also in those without APEX: it imports nothing that llm-foundry has not imported
already, and leaves alone what it does not know.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger

Settings = dict[str, Any]


def normalise_algorithms(config: Settings) -> Settings:
    """Turn every form of a training configuration's `algorithms` into the one llm-foundry accepts.

    `[apex]`, `[apex, {gradient_clipping: {...}}]`, `{apex: null}` and `{apex: {...}}` all become a
    mapping from name to settings, in the order given. llm-foundry itself takes a mapping only.

    Args:
        config: The configuration, resolved, before llm-foundry checks it. Not modified.

    Returns:
        A shallow copy with `algorithms` as a mapping, or `config` itself where there are none or
        where they have a form not known here, which llm-foundry then reports in its own words.

    Raises:
        ValueError: A list names an algorithm twice, or has settings beside the name of an
            algorithm instead of below it.
    """
    algorithms = config.get("algorithms") if isinstance(config, Mapping) else None
    if isinstance(algorithms, Sequence) and not isinstance(algorithms, str):
        algorithms = _from_list(algorithms)
    if not isinstance(algorithms, Mapping):
        return config
    normalised = copy(config)
    normalised["algorithms"] = {
        name: {} if settings is None else settings for name, settings in algorithms.items()
    }
    return normalised


def _from_list(entries: Sequence[Any]) -> Settings | None:
    """Merge a list of names and one-algorithm mappings; None if an entry is neither."""
    merged: Settings = {}
    for entry in entries:
        named = {entry: None} if isinstance(entry, str) else entry
        if not isinstance(named, Mapping):
            return None
        _refuse_settings_beside_the_name(named)
        for name, settings in named.items():
            if name in merged:
                raise ValueError(
                    f"algorithms: {name!r} is listed twice. List every algorithm once, with all "
                    f"its settings below its name: `- {name}: {{...}}`."
                )
            merged[name] = settings
    return merged


def _refuse_settings_beside_the_name(entry: Mapping[str, Any]) -> None:
    """Recognise `- apex:` followed by settings that are not indented below it."""
    loose = [key for key, value in entry.items() if not isinstance(value, Mapping | None)]
    if loose:
        first = next(iter(entry))
        raise ValueError(
            f"algorithms: the list entry {dict(entry)!r} gives {loose} a plain value, but the "
            f"value of an algorithm's name is a mapping of its settings or nothing. Indent the "
            f"settings below the name: `- {first}: {{{loose[0]}: {entry[loose[0]]!r}}}`."
        )


class PreparedData(Callback):
    """Refuses data that was prepared for another tokenizer, vocabulary or sequence length.

    llm-foundry's callback `prepared_data`. It compares the manifest that `apex-composer prep`
    leaves beside its shards, here or in the remote store, with the run: training and evaluation
    data. Shards without a manifest pass. What the trainer is built with is compared before a
    checkpoint is loaded, what comes with `fit()` before the first batch.

    Raises:
        ValueError: something does not fit; the message names all of it.
    """

    def __init__(self) -> None:
        self._checked: list[Any] = []

    def before_load(self, state: State, logger: Logger) -> None:
        """Compare what the trainer was built with."""
        self.check_fit(state)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Compare what came with `fit()`."""
        self.check_fit(state)

    def check_fit(self, state: State) -> None:
        """Compare every stream's manifest that was not yet with the run's tokenizer and model."""
        from apex_composer.data_prep.tokens.tokenizer import hash_backend
        from apex_composer.data_prep.write.manifest import check_manifest

        evaluated = [evaluator.dataloader.dataloader for evaluator in state.evaluators]
        datasets = [getattr(d, "dataset", None) for d in (state.train_dataloader, *evaluated)]
        model = getattr(state.model, "module", state.model)
        tokenizer = getattr(getattr(model, "tokenizer", None), "backend_tokenizer", None)
        if tokenizer is None:
            return
        known_hash = hash_backend(tokenizer.to_str())
        for dataset in datasets:
            if any(dataset is checked for checked in self._checked):
                continue
            for stream in getattr(dataset, "streams", ()):
                check_manifest(
                    stream.local,
                    known_hash,
                    model.model.config.vocab_size,
                    dataset.max_seq_len,
                    remote=stream.remote,
                )
            self._checked.append(dataset)


class FusedSwiGLUCallback(Callback):
    """The Llama family's SwiGLU in one kernel, for runs without APEX.

    llm-foundry's callback `fused_swiglu`. A comparison of APEX with an ordinary run is fair when
    both have the same SwiGLU: APEX turns it on by itself where the kernel runs.

    Args:
        setting: True, False, or `auto` for only where the kernel runs. Default True.

    Raises:
        ValueError: for another setting.
        TypeError: for unknown settings.
    """

    def __init__(self, setting: bool | str = True, **unknown: Any):
        from apex_composer.model.fused_swiglu import FUSED_SWIGLU
        from apex_composer.settings import check_choice, check_keys

        check_keys("fused_swiglu", unknown, ("setting",))
        check_choice("fused_swiglu: setting", setting, FUSED_SWIGLU)
        self.setting = setting
        self._fused: Any = None

    def init(self, state: State, logger: Logger) -> None:
        """Replace the forward of the model's MLPs.

        Raises:
            ValueError: with True, where the kernel cannot run or the model has no SwiGLU.
        """
        from apex_composer.model.fused_swiglu import FusedSwiGLU

        device = "cuda" if state.device.name == "gpu" else state.device.name
        self._fused = FusedSwiGLU(state.model, self.setting, device=device)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Say where a compiled model keeps its own."""
        self._fused.log_compiled(state.model)

    def close(self, state: State, logger: Logger) -> None:
        """Give the MLPs their own forward back."""
        if self._fused is not None:
            self._fused.remove()
