import json

from backends import TEXTS
from corpus import write_corpus
from prep_inputs import train_sentencepiece, write_texts, write_tokenizer

from apex_composer.data_prep.tokens.tokenizer import read_backend
from apex_composer.data_prep.tokens.word_encoder import (
    ASCII_BLANK_WORDS,
    encode_all,
    make_word_encoder,
)


def test_the_sentencepiece_vocabulary_is_of_llamas_kind(tmp_path):
    train_sentencepiece(TEXTS, 420, tmp_path / "trained").save_pretrained(tmp_path)
    backend = read_backend(str(tmp_path / "tokenizer.json"))
    parts = json.loads(backend.to_str())
    steps = [step["type"] for step in parts["normalizer"]["normalizers"]]
    assert (steps, parts["pre_tokenizer"]) == (["Prepend", "Replace"], None)
    assert parts["model"]["byte_fallback"] and backend.get_vocab_size() == 420
    encoder = make_word_encoder(backend)
    assert encoder.__self__.smaller_words is ASCII_BLANK_WORDS
    for own, reference in zip(encoder(TEXTS), encode_all(backend, TEXTS), strict=True):
        assert own.tolist() == reference.tolist()


def test_few_texts_are_a_part_of_all_and_a_tokenizer_is_written(tmp_path):
    texts = write_texts(write_corpus(tmp_path / "corpus"), 0.02, tmp_path)
    written = {
        kind: [json.loads(line)["text"] for line in (tmp_path / kind / "text/text.jsonl").open()]
        for kind in ("all", "few")
    }
    assert written["all"] == texts and set(written["few"]) <= set(texts)
    write_tokenizer("byte-level", texts, 300, tmp_path / "tokenizer")
    backend = read_backend(str(tmp_path / "tokenizer" / "tokenizer.json"))
    assert backend.get_vocab_size() == 300
