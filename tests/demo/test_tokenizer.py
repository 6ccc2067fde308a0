import pytest
from corpus import sentences

from apex_composer.data_prep.tokens.tokenizer import hash_backend
from apex_composer.demo.tokenizer import BOS, EOS, PAD, save_tokenizer, train_tokenizer

TEXTS = [sentences(seed) for seed in range(20)]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, 300)


@pytest.mark.parametrize("text", ["bei runo", " two  spaces\n\ttab", "\u00e9\u4e2d\U0001f600\x00"])
def test_every_text_survives_the_round_trip(trained, text):
    assert trained.decode(trained.encode(text, add_special_tokens=False).ids) == text


def test_the_vocabulary_has_the_size_asked_for(trained):
    assert trained.get_vocab_size() == 300
    assert [trained.token_to_id(token) for token in (BOS, EOS, PAD)] == [0, 1, 2]


def test_a_document_cannot_spell_out_a_marker(trained):
    assert not {0, 1, 2} & set(trained.encode(f"a{BOS}b{EOS}", add_special_tokens=False).ids)


def test_the_saved_tokenizer_is_what_transformers_loads(trained, tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(trained, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (BOS, EOS, PAD)
    assert loaded(TEXTS[0]).input_ids[0] == loaded.bos_token_id
    assert set(loaded(TEXTS[0])) == {"input_ids", "attention_mask"}
    assert loaded(TEXTS[0], add_special_tokens=False).input_ids == (
        trained.encode(TEXTS[0], add_special_tokens=False).ids
    )


def test_training_is_deterministic(trained, tmp_path):
    save_tokenizer(trained, tmp_path / "a")
    save_tokenizer(train_tokenizer(TEXTS, 300), tmp_path / "b")
    texts = [(tmp_path / name / "tokenizer.json").read_text() for name in ("a", "b")]
    assert hash_backend(texts[0]) == hash_backend(texts[1])


def test_a_vocabulary_that_cannot_hold_all_bytes_is_refused():
    with pytest.raises(ValueError, match="vocabulary_size=258 is too small"):
        train_tokenizer(TEXTS, 258)


def test_texts_that_yield_fewer_tokens_give_a_smaller_vocabulary():
    assert train_tokenizer(["ab ab"], 4096).get_vocab_size() == 259 + 2  # `ab` and ` ab`
