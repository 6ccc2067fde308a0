"""What has to hold before the first optimizer step: each check says what to do if it does not."""

import math
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal

DEFAULT_MARGIN = 1.0
# Where Hugging Face's configurations and llm-foundry's MPT say how long a context may be.
_CONTEXT_NAMES = ("max_position_embeddings", "max_seq_len")
# Moments that an optimizer keeps for each parameter; others are taken for Adam, and said to be.
_ADAM_MOMENTS = 2
_MOMENTS = {
    **dict.fromkeys(("decoupled_adamw", "adamw", "adam"), _ADAM_MOMENTS),
    **dict.fromkeys(("decoupled_lionw", "lion", "decoupled_sgdw", "sgd"), 1),
}
_FP32 = 4


def check_loss(loss: float, vocabulary: int, margin: float) -> None:
    """Refuse a pretrained model that predicts no better than an untrained one.

    Untrained weights give ln(vocabulary) on any text, trained ones are several nats below. Weights
    that failed to load in silence have cost whole runs.

    Args:
        loss: mean of the first microbatch, in nats per token.
        vocabulary: tokens that the model knows.
        margin: distance below ln(vocabulary) that it has to keep, in nats.

    Raises:
        ValueError: it is not, or it is no number.
    """
    highest = math.log(vocabulary) - margin
    if not loss < highest:
        raise ValueError(
            f"start_guard: the first loss is {loss:.3f}, allowed for a pretrained model: below "
            f"{highest:.3f} (ln of {vocabulary} tokens minus margin {margin:g}). Untrained weights "
            f"give {math.log(vocabulary):.3f}: either they were not loaded (compare the names in "
            "the checkpoint with the model's), or the data's tokens are not this model's. If the "
            "loss is meant to be so high: callbacks.start_guard.margin=null"
        )


def check_context(length: int, model_config: Any) -> None:
    """Refuse sequences longer than the positions that the model knows.

    Args:
        length: tokens of a sequence.
        model_config: configuration of the model; one that names no longest context passes.

    Raises:
        ValueError: naming both and the override that extends the model.
    """
    for setting in _CONTEXT_NAMES:
        longest = getattr(model_config, setting, None)
        if longest is not None and length > longest:
            raise ValueError(
                f"max_seq_len: got {length}, but the model's {setting} is {longest}. Train with "
                f"sequences of at most {longest} tokens, or extend the model, which then has to "
                f"learn the new positions: model.config_overrides.{setting}: ${{max_seq_len}}"
            )


def has_soft_cap(settings: Mapping[str, Any]) -> bool:
    """Whether a model of these settings caps its attention's logits, as Gemma 2 does."""
    return any(
        own.get("attn_logit_softcapping") is not None
        for own in (settings, settings.get("text_config") or {})
    )


def check_attention(model_config: Any) -> None:
    """Refuse transformers' sdpa where it leaves out, in silence, the soft-cap of attention.

    Args:
        model_config: configuration of the model; another one than transformers' passes.

    Raises:
        ValueError: naming the implementations that have it.
    """
    settings = model_config.to_dict() if hasattr(model_config, "to_dict") else {}
    if getattr(model_config, "_attn_implementation", None) == "sdpa" and has_soft_cap(settings):
        raise ValueError(
            "model.attn_implementation: got 'sdpa', but the model caps the logits of attention "
            "(attn_logit_softcapping), which transformers' sdpa leaves out. Allowed: eager, "
            "flash_attention_2"
        )


def check_vocabulary(tokens: int, vocabulary: int) -> None:
    """Refuse a tokenizer that has tokens which the model does not know.

    Raises:
        ValueError: naming both sizes.
    """
    if tokens > vocabulary:
        raise ValueError(
            f"tokenizer: it has {tokens} tokens, the model knows {vocabulary}. Use the model's own "
            "tokenizer (tokenizer.name as model.pretrained_model_name_or_path)"
        )


def tell_unlearned_eos(config: Mapping[str, Any], tokenizer: Any) -> None:
    """Warn where the loss leaves the end of documents out.

    llm-foundry's `text` loader takes every padding token out of the loss, which many tokenizers'
    eos is as well (transformers' DataCollatorForLanguageModeling).

    Args:
        config: llm-foundry's.
        tokenizer: with `eos_token_id` and `pad_token_id`, either of which may be None.
    """
    loader, eos = (config.get("train_loader") or {}).get("name"), tokenizer.eos_token_id
    if loader == "text" and eos is not None and eos == tokenizer.pad_token_id:
        warnings.warn(
            f"tokenizer: its padding token is its eos ({tokenizer.eos_token!r}), and the `text` "
            "loader takes padding out of the loss: where documents end in eos, the model does not "
            "learn to end them. To train eos, give it another padding token, which the data do not "
            "have, for example tokenizer.kwargs.pad_token: '<unk>'",
            stacklevel=2,
        )


def check_batches(batch: int, ranks: int, microbatch: int | float | str) -> None:
    """Refuse batches that cannot be shared out evenly.

    Args:
        batch: global_train_batch_size.
        ranks: processes, one for each GPU.
        microbatch: device_train_microbatch_size, or `auto`.

    Raises:
        ValueError: with the nearest sizes that fit.
    """
    if batch % ranks:
        down = batch - batch % ranks
        near = [str(size) for size in (down, down + ranks) if size]
        raise ValueError(
            f"global_train_batch_size: got {batch} for {ranks} GPUs, allowed: multiples of the "
            f"number of GPUs, for example {' or '.join(near)}"
        )
    share = batch // ranks
    if isinstance(microbatch, int) and microbatch < share and share % microbatch:
        fits = [size for size in range(1, share + 1) if share % size == 0]
        raise ValueError(
            f"device_train_microbatch_size: got {microbatch}, but each GPU has {share} sequences "
            f"of a batch, and an uneven last microbatch wastes time and memory. Allowed: "
            f"{', '.join(map(str, fits))}"
        )


@dataclass(frozen=True)
class Checkpoints:
    """How many checkpoints a run writes, and how large they are.

    Attributes:
        saves: number in all; None where that depends on the length of an epoch.
        kept: number on the disk at the same time, at most; None as above.
        size: bytes of each; the operators' share is below a percent.
        least: bytes of each at least, where an optimizer may keep less than Adam. Default: size.
    """

    saves: int | None
    kept: int | None
    size: int
    least: int | None = None


def count_checkpoints(
    config: Mapping[str, Any],
    parameters: int,
    trained: int | None = None,
    width: int = _FP32,
    *,
    copied: bool = True,
) -> Checkpoints:
    """The checkpoints of a run, from its training configuration.

    Args:
        config: llm-foundry's.
        parameters: number of the weights in a checkpoint.
        trained: how many of them, where only rows or adapters are trained. Default: all.
        width: bytes of each weight, and of its moments unless it has a copy or is an adapter's,
            in fp32. Default 4.
        copied: whether those that are trained have copies in fp32, as rows have. Default True.
    """
    saves, keep = _count_saves(config), config.get("save_num_checkpoints_to_keep", -1)
    kept = saves
    if keep >= 0:  # the oldest one is deleted only after the newest is written
        kept = keep + 1 if saves is None else min(keep + 1, saves)
    state = not config.get("save_weights_only", False)
    rows = copied and trained is not None  # beside the weights, with two moments each
    trained = parameters if trained is None else trained
    adapters = (config.get("model") or {}).get("peft_config")
    each = state * trained * (_FP32 if rows or adapters else width)
    held = width * parameters + state * averages(config) * _FP32 * trained
    if rows:
        return Checkpoints(saves, kept, held + each * (1 + _ADAM_MOMENTS))
    sizes = (held + each * moments(config, unknown) for unknown in (_ADAM_MOMENTS, 0))
    return Checkpoints(saves, kept, *sizes)


def weight_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of a weight, by llm-foundry's `master_weights_dtype`."""
    given = str((config.get("model") or {}).get("master_weights_dtype"))
    return 2 if given in ("bf16", "bfloat16", "fp16", "float16") else _FP32


def moments(config: Mapping[str, Any], unknown: int = _ADAM_MOMENTS) -> int:
    """How many numbers a run's optimizer keeps for each parameter.

    Args:
        config: llm-foundry's.
        unknown: of an optimizer that may keep less than Adam (galore, apollo, muon). Default 2.
    """
    return _MOMENTS.get((config.get("optimizer") or {}).get("name"), unknown)


def counted_as(config: Mapping[str, Any]) -> str:
    """That an optimizer's memory is taken for Adam's; nothing where it is known."""
    name = (config.get("optimizer") or {}).get("name")
    return "" if name in (None, *_MOMENTS) else f", {name} counted as AdamW"


def averages(config: Mapping[str, Any]) -> int:
    """How many averages of what is trained a run keeps beside it: that of `ema`."""
    return int("ema" in (config.get("algorithms") or {}))


def unit_tokens(config: Mapping[str, Any]) -> dict[str, int]:
    """Tokens of a batch, a sample and a token; those of an epoch only the data knows."""
    length = config["max_seq_len"]
    return {"ba": config["global_train_batch_size"] * length, "sp": length, "tok": 1}


def _count_saves(config: Mapping[str, Any]) -> int | None:
    """How many checkpoints there will be in all; one is always written at the end."""
    from composer.core import TimeUnit, ensure_time  # doctor needs this file, but no Composer

    # llm-foundry's default where the YAML does not say.
    times = config["max_duration"], config.get("save_interval", "1000ba")
    total, step = (ensure_time(time, TimeUnit.EPOCH) for time in times)
    if step.unit == TimeUnit.DURATION:
        return math.ceil(round(1 / step.value, 9))
    tokens = unit_tokens(config) if step.unit != total.unit else {step.unit.value: 1}
    if not {step.unit.value, total.unit.value} <= set(tokens):
        return None
    share = total.value * tokens[total.unit.value] / (step.value * tokens[step.unit.value])
    return math.ceil(round(share, 9))


def check_disk(folder: Path, checkpoints: Checkpoints) -> None:
    """Refuse a run whose checkpoints cannot all be saved.

    Args:
        folder: place of the checkpoints. It need not exist yet; those in it count as this run's.
        checkpoints: number and size of what the run writes.

    Raises:
        ValueError: with what is needed, what is free, and what to do.
    """
    if checkpoints.kept is None:
        return
    own = [*folder.glob("*.pt"), *folder.glob("*/*.distcp")]  # files, and folders of shards
    links = {path for path in folder.glob("*") if path.is_symlink()}  # `latest`
    existing = sum(p.stat().st_size for p in own if p.is_file() and not {p, p.parent} & links)
    size = checkpoints.size if checkpoints.least is None else checkpoints.least
    needed = max(0, checkpoints.kept * size - existing)
    free = free_bytes(folder)
    if needed > free:
        raise ValueError(
            f"save_folder: {checkpoints.kept} checkpoints of {decimal(size)} need "
            f"{decimal(needed)} in {folder}, free are {decimal(free)}. Save to another disk, make "
            "`save_interval` longer, or keep fewer with `save_num_checkpoints_to_keep`"
        )


def free_bytes(folder: Path) -> int:
    """Free space where a folder is or will be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
