"""What has to hold before the first optimizer step: each check says what to do if it does not."""

import math

DEFAULT_MARGIN = 1.0


def check_loss(loss: float, vocabulary: int, margin: float) -> None:
    """Refuse a pretrained model that predicts no better than an untrained one.

    Untrained weights give ln(vocabulary) on any text, trained ones are several nats below. Weights
    that failed to load in silence have cost whole runs.

    Args:
        loss: of the first microbatch, in nats per token.
        vocabulary: tokens that the model knows.
        margin: how far below ln(vocabulary) it has to be, in nats.

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


def check_context(length: int, longest: int | None, setting: str) -> None:
    """Refuse sequences longer than the positions that the model knows.

    Raises:
        ValueError: naming both and the override that extends the model.
    """
    if longest is not None and length > longest:
        raise ValueError(
            f"max_seq_len: got {length}, but the model's {setting} is {longest}. Train with "
            f"sequences of at most {longest} tokens, or extend the model, which then has to learn "
            f"the new positions: model.config_overrides.{setting}: ${{max_seq_len}}"
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
