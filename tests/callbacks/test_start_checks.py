import math

import pytest

from apex_composer.callbacks.start_checks import (
    check_batches,
    check_context,
    check_loss,
    check_vocabulary,
)


def test_a_pretrained_loss_passes():
    check_loss(2.1, 32000, margin=1.0)


@pytest.mark.parametrize("loss", [10.375, 9.5, math.nan, math.inf])
def test_the_loss_of_untrained_weights_is_refused(loss):
    """10.375 was the constant loss of a run elsewhere whose weights had not been loaded."""
    with pytest.raises(ValueError, match=r"first loss is .*below 9\.373 \(ln of 32000 tokens"):
        check_loss(loss, 32000, margin=1.0)


def test_a_context_longer_than_the_models_is_refused():
    check_context(2048, 2048, "max_position_embeddings")
    check_context(4096, None, "max_seq_len")
    with pytest.raises(ValueError, match=r"max_seq_len: got 4096, .*is 2048\..*config_overrides"):
        check_context(4096, 2048, "max_position_embeddings")


def test_tokens_that_the_model_does_not_know_are_refused():
    check_vocabulary(32000, 32000)
    with pytest.raises(ValueError, match="it has 32001 tokens, the model knows 32000"):
        check_vocabulary(32001, 32000)


@pytest.mark.parametrize(
    ("batch", "ranks", "microbatch"), [(64, 8, 2), (64, 8, 16), (6, 2, "auto")]
)
def test_batches_that_divide_pass(batch, ranks, microbatch):
    check_batches(batch, ranks, microbatch)


@pytest.mark.parametrize(
    ("batch", "ranks", "microbatch", "told"),
    [
        (64, 24, 1, "global_train_batch_size: got 64 for 24 GPUs.* 48 or 72"),
        (4, 8, 1, "got 4 for 8 GPUs.*for example 8"),
        (64, 8, 3, "device_train_microbatch_size: got 3, .* 8 sequences.*1, 2, 4, 8"),
    ],
)
def test_uneven_batches_are_refused(batch, ranks, microbatch, told):
    with pytest.raises(ValueError, match=told):
        check_batches(batch, ranks, microbatch)
