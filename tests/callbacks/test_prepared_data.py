"""Data prepared for another tokenizer, vocabulary or length are refused."""

from types import SimpleNamespace

import pytest
from corpus import write_corpus
from transformers import AutoTokenizer

from apex_composer.callbacks import prepared_data
from apex_composer.callbacks.prepared_data import PreparedData
from apex_composer.demo.from_scratch import prepare_from_scratch


class FakeTokenizer:
    """The one attribute of a fast tokenizer that the check reads."""

    def __init__(self, description: str):
        self.backend_tokenizer = SimpleNamespace(to_str=lambda: description)


def state_with(folder, description: str, *, vocabulary: int, length: int, evaluated=False):
    """A run that streams `folder`, as far as the check looks at it."""
    streams = [SimpleNamespace(local=str(folder), remote=None)]
    dataset = SimpleNamespace(streams=streams, max_seq_len=length)
    loader = SimpleNamespace(dataset=dataset)
    other = SimpleNamespace(dataset=None)
    evaluator = SimpleNamespace(
        dataloader=SimpleNamespace(dataloader=loader if evaluated else other)
    )
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=vocabulary))
    return SimpleNamespace(
        train_dataloader=other if evaluated else loader,
        evaluators=[evaluator],
        model=SimpleNamespace(model=model, tokenizer=FakeTokenizer(description)),
    )


def test_prepared_data_is_compared_with_the_run(tmp_path):
    write_corpus(tmp_path / "text")
    out = tmp_path / "data"
    prepare_from_scratch(tmp_path / "text", out, vocabulary_size=300, sequence_length=32)
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    description = tokenizer.backend_tokenizer.to_str()
    shards = out / "train" / "train" / "book"
    check = PreparedData().fit_start
    check(state_with(shards, description, vocabulary=300, length=32), None)
    for changed, told in (
        ({"length": 64}, "32 tokens, max_seq_len is 64"),
        ({"vocabulary": 200}, "300 tokens, the model's has 200"),
        ({"description": description.replace('"e"', '"\\u00e9"', 1)}, "tokenizer"),
    ):
        settings = {"description": description, "vocabulary": 300, "length": 32, **changed}
        with pytest.raises(ValueError, match=told):
            check(state_with(shards, settings.pop("description"), **settings), None)
    with pytest.raises(ValueError, match="max_seq_len is 64"):
        check(state_with(shards, description, vocabulary=300, length=64, evaluated=True), None)
    check(state_with(tmp_path / "elsewhere", description, vocabulary=1, length=1), None)


def test_a_slow_tokenizer_is_no_reason_to_compare_nothing(tmp_path):
    """llm-foundry would cut every sample at max_seq_len in silence."""
    write_corpus(tmp_path / "text")
    out = tmp_path / "data"
    prepare_from_scratch(tmp_path / "text", out, vocabulary_size=300, sequence_length=32)
    state = state_with(out / "train" / "train" / "book", "", vocabulary=300, length=16)
    state.model.tokenizer = SimpleNamespace()
    with pytest.raises(ValueError, match="32 tokens, max_seq_len is 16"):
        PreparedData().fit_start(state, None)


def test_prepared_data_is_compared_once_and_as_early_as_it_is_known(monkeypatch, tmp_path):
    compared = []
    monkeypatch.setattr(
        prepared_data, "check_manifest", lambda local, *_, **__: compared.append(local)
    )
    state = state_with(tmp_path / "built", "{}", vocabulary=1, length=1)
    callback = PreparedData()
    callback.before_load(state, None)
    assert compared == [tmp_path / "built"]
    callback.fit_start(state, None)
    assert len(compared) == 1
    # A loader that comes with fit() is compared by the algorithm before its first assessment.
    state.train_dataloader = state_with(
        tmp_path / "fit", "{}", vocabulary=1, length=1
    ).train_dataloader
    callback.check_fit(state)
    callback.fit_start(state, None)
    assert compared == [tmp_path / "built", tmp_path / "fit"]
