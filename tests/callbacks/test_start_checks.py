import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from apex_composer.callbacks.start_checks import (
    Checkpoints,
    check_attention,
    check_batches,
    check_context,
    check_disk,
    check_loss,
    check_vocabulary,
    count_checkpoints,
    counted_as,
    free_bytes,
    tell_unlearned_eos,
    weight_bytes,
)

CONFIG = {"global_train_batch_size": 64, "max_seq_len": 4096, "max_duration": "30000ba"}


def test_a_pretrained_loss_passes():
    check_loss(2.1, 32000, margin=1.0)


@pytest.mark.parametrize("loss", [10.375, 9.5, math.nan, math.inf])
def test_the_loss_of_untrained_weights_is_refused(loss):
    """10.375 was the constant loss of a run elsewhere whose weights had not been loaded."""
    with pytest.raises(ValueError, match=r"first loss is .*below 9\.373 \(ln of 32000 tokens"):
        check_loss(loss, 32000, margin=1.0)


def test_a_context_longer_than_the_models_is_refused():
    model = SimpleNamespace(max_position_embeddings=2048)
    check_context(2048, model)
    check_context(4096, SimpleNamespace(max_position_embeddings=None))
    check_context(4096, None)
    with pytest.raises(ValueError, match=r"max_seq_len: got 4096, .*is 2048\..*config_overrides"):
        check_context(4096, model)


def test_attention_without_its_cap_is_refused():
    def config(attention, **settings):
        return SimpleNamespace(_attn_implementation=attention, to_dict=lambda: settings)

    for settings in ({"attn_logit_softcapping": 50.0},
                     {"text_config": {"attn_logit_softcapping": 50.0}}):  # fmt: skip
        with pytest.raises(
            ValueError, match="model.attn_implementation: got 'sdpa'.*Allowed: eage"
        ):
            check_attention(config("sdpa", **settings))
        check_attention(config("eager", **settings))
    for other in (
        config("sdpa", attn_logit_softcapping=None),
        config("sdpa"),
        SimpleNamespace(),
        None,
    ):
        check_attention(other)


def test_tokens_that_the_model_does_not_know_are_refused():
    check_vocabulary(32000, 32000)
    with pytest.raises(ValueError, match="it has 32001 tokens, the model knows 32000"):
        check_vocabulary(32001, 32000)


@pytest.mark.parametrize(("loader", "told"), [("text", True), ("finetuning", False)])
def test_an_eos_that_the_loss_leaves_out_is_told(loader, told, recwarn):
    config = {"train_loader": {"name": loader}}
    tell_unlearned_eos(config, SimpleNamespace(eos_token="</s>", eos_token_id=2, pad_token_id=2))
    lines = [str(warning.message) for warning in recwarn]
    begin = "tokenizer: its padding token is its eos ('</s>')"
    assert len(lines) == told and all(line.startswith(begin) for line in lines)
    for eos, pad in ((2, 0), (2, None), (None, None)):
        tell_unlearned_eos(config, SimpleNamespace(eos_token_id=eos, pad_token_id=pad))
    assert len(recwarn) == told


def test_the_text_loader_leaves_eos_out_where_it_is_the_padding_token():
    """What the warning says."""
    from llmfoundry.data.utils import get_text_collator
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3}, "<unk>"))
    for pad, labels in (("</s>", [0, 3, -100, 0]), ("<unk>", [0, 3, 1, 0])):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token=pad)
        collate, _ = get_text_collator({"dataset": {}}, tokenizer, 1)
        assert collate([{"input_ids": [0, 3, 1, 0]}])["labels"].tolist() == [labels]


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


@pytest.mark.parametrize(
    ("max_duration", "interval", "saves"),
    [
        ("30000ba", "1000ba", 30),
        ("30001ba", "1000ba", 31),
        ("30000ba", "1dur", 1),
        ("30000ba", "0.1dur", 10),
        ("2_621_440_000tok", "1000ba", 10),
        ("640sp", "5ba", 2),
        ("3ep", "1ep", 3),
        (3, 1, 3),
        ("3ep", "1000ba", None),
    ],
)
def test_number_of_checkpoints(max_duration, interval, saves):
    config = CONFIG | {"max_duration": max_duration, "save_interval": interval}
    assert count_checkpoints(config, 1).saves == saves


@pytest.mark.parametrize(
    ("duration", "keep", "kept"),
    [
        ("30000ba", -1, 30),
        ("30000ba", 2, 3),
        ("2000ba", 5, 2),
        ("3ep", 2, 3),
        ("3ep", -1, None),
        ("30000ba", 0, 1),
    ],
)
def test_number_on_the_disk_at_the_same_time(duration, keep, kept):
    config = CONFIG | {"max_duration": duration, "save_num_checkpoints_to_keep": keep}
    assert count_checkpoints(config, 1).kept == kept


@pytest.mark.parametrize(
    ("changed", "bytes_of_each"),
    [
        ({"optimizer": {"name": "decoupled_adamw"}}, 12),
        ({"optimizer": {"name": "decoupled_lionw"}}, 8),
        ({"save_weights_only": True}, 4),
        ({"algorithms": {"ema": {}}}, 16),
    ],
)
def test_size_of_a_checkpoint(changed, bytes_of_each):
    assert count_checkpoints(CONFIG | changed, 10).size == 10 * bytes_of_each


def test_an_optimizer_that_may_keep_less_than_adam_is_shown_as_adam_and_refused_by_its_least(
    tmp_path, monkeypatch
):
    galore = CONFIG | {"optimizer": {"name": "galore"}}
    found = count_checkpoints(galore, 100, 100, copied=False)
    assert (found.size, found.least) == (1200, 400)
    assert counted_as(galore) == ", galore counted as AdamW"
    assert counted_as(CONFIG) == counted_as({}) == ""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 400))
    check_disk(tmp_path, replace(found, kept=3))
    with pytest.raises(ValueError, match="4 checkpoints of 400 bytes"):
        check_disk(tmp_path, replace(found, kept=4))


def test_moments_are_as_wide_as_what_is_trained():
    """In bf16 those of whole weights are, too; those of adapters and of rows are in fp32."""
    assert count_checkpoints(CONFIG, 100, 100, 2, copied=False).size == 100 * 2 * 3
    lora = CONFIG | {"model": {"peft_config": {"r": 8}}}
    assert count_checkpoints(lora, 100, 10, 2, copied=False).size == 100 * 2 + 10 * 8


def test_of_frozen_weights_there_are_no_moments_and_no_average():
    averaged = CONFIG | {"algorithms": {"ema": {}}}
    assert count_checkpoints(averaged, 100, 10, copied=False).size == 100 * 4 + 10 * 12


def test_checkpoints_of_rows_have_the_weights_and_the_rows_beside_them():
    """Copies in fp32 with two moments; the weights in the model's precision."""
    low = {"model": {"master_weights_dtype": "bf16"}}
    assert (weight_bytes(CONFIG), weight_bytes(CONFIG | low)) == (4, 2)
    assert count_checkpoints(CONFIG, 100, 10, 2).size == 100 * 2 + 10 * 12
    assert count_checkpoints(CONFIG | {"save_weights_only": True}, 100, 10, 2).size == 100 * 2


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3000))
    folder = tmp_path / "not" / "yet"
    assert free_bytes(folder) == 3000
    check_disk(folder, Checkpoints(saves=2, kept=2, size=1300))
    check_disk(folder, Checkpoints(saves=None, kept=None, size=1300))
    too_many = Checkpoints(saves=9, kept=3, size=1300)
    told = "3 checkpoints of 1.3 kB need 3.9 kB in .*free are 3.0 kB.*save_interval"
    with pytest.raises(ValueError, match=told):
        check_disk(folder, too_many)
    folder.mkdir(parents=True)
    (folder / "ep0-ba1-rank0.pt").write_bytes(bytes(1300))
    check_disk(folder, too_many)


def test_shards_that_are_there_count_once(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2000))
    two, shards = Checkpoints(saves=2, kept=2, size=1300), tmp_path / "ep0-ba1"
    shards.mkdir()
    (shards / "__0_0.distcp").write_bytes(bytes(599))
    (tmp_path / "latest-rank0.pt").symlink_to(shards.name)
    with pytest.raises(ValueError, match="need 2.0 kB"):
        check_disk(tmp_path, two)
    (shards / "__1_0.distcp").write_bytes(bytes(1))
    check_disk(tmp_path, two)
