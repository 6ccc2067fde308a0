import importlib
import json
import sys

import numpy as np
import pytest
from corpus import sentences, write_corpus, write_jsonl
from reproduce.texts import SPLITS, load, main, prepare, prepare_small, windows

SIZES = {"vocabulary": 300, "domain_bytes": 10_000_000, "held_out_tokens": 2000}
DOMAINS = ("book", "github")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Domains of 40 and 80 documents, and one of the first that is twice in the second."""
    folder = write_corpus(tmp_path_factory.mktemp("corpus"))
    again = json.dumps({"text": sentences(0)})
    write_jsonl(folder / "github" / "again.jsonl", [again.encode()] * 2)
    return folder


@pytest.fixture(scope="module")
def prepared(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts") / "prepared"
    prepare(folder, data, **SIZES)
    return folder


@pytest.fixture
def copied(prepared, tmp_path):
    """For tests that damage it."""
    for path in prepared.rglob("*.*"):
        copy = tmp_path / "copied" / path.relative_to(prepared)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return tmp_path / "copied"


def read_documents(folder, split, domain):
    """The texts of a stream: what stands between BOS and EOS, decoded."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos, eos = (tokenizer.token_to_id(f"<|{name}_of_text|>") for name in ("begin", "end"))
    stream = np.array(load(folder).streams[split][domain])
    starts, ends = np.flatnonzero(stream == bos), np.flatnonzero(stream == eos)
    assert starts[0] == 0 and ends[-1] == len(stream) - 1
    assert (starts[1:] == ends[:-1] + 1).all()
    return [
        tokenizer.decode(stream[start + 1 : end]) for start, end in zip(starts, ends, strict=True)
    ]


def test_every_text_is_in_one_split_once_and_in_the_order_of_its_hash(prepared):
    from apex_composer.data_prep.tokens.document_hash import hash_text

    found = {s: {d: read_documents(prepared, s, d) for d in DOMAINS} for s in SPLITS}
    every = [text for split in found.values() for own in split.values() for text in own]
    assert sorted(every) == sorted(map(sentences, range(120)))
    for domain in DOMAINS:
        own = [text for s in ("held_out", "continued", "base") for text in found[s][domain]]
        assert own == sorted(own, key=hash_text)


def test_the_splits_have_the_tokens_that_were_asked_for(prepared):
    loaded = load(prepared)
    for domain in DOMAINS:
        counts = {split: len(loaded.streams[split][domain]) for split in SPLITS}
        assert counts == loaded.facts["domains"][domain]
        one_document = 1.5 * sum(counts.values()) / sum(loaded.facts["documents"][domain].values())
        training = counts["base"] + counts["continued"]
        assert 0 <= counts["held_out"] - 2000 < one_document
        assert 0 <= counts["continued"] - 0.3 * training < one_document


def test_the_tokenizer_learns_the_same_of_every_domain_and_nothing_that_is_held_out(
    prepared, data, tmp_path, monkeypatch
):
    from reproduce import text_streams

    learned, train = [], text_streams.train_tokenizer

    def remember(texts, vocabulary):
        learned.extend(texts)
        return train(learned, vocabulary)

    monkeypatch.setattr(text_streams, "train_tokenizer", remember)
    monkeypatch.setattr(text_streams, "TOKENIZER_BYTES", 10_000)
    prepare(tmp_path / "texts", data, **SIZES)
    books = {sentences(seed) for seed in range(40)}
    for own in (set(learned) & books, set(learned) - books):
        assert 5_000 <= sum(map(len, own)) < 5_000 + max(map(len, own))
    for domain in DOMAINS:
        assert not set(learned) & set(read_documents(tmp_path / "texts", "held_out", domain))


def test_the_same_texts_in_other_files_give_the_same_streams(prepared, tmp_path):
    write_jsonl(tmp_path / "book" / "a.jsonl", [sentences(seed) for seed in reversed(range(40))])
    write_jsonl(tmp_path / "github" / "b.jsonl", [sentences(seed) for seed in range(40, 120)])
    prepare(tmp_path / "texts", tmp_path, **SIZES)
    assert load(tmp_path / "texts").hash == load(prepared).hash
    prepare(tmp_path / "other", tmp_path, **SIZES | {"held_out_tokens": 1000})
    assert load(tmp_path / "other").hash != load(prepared).hash


def test_texts_that_fit_are_left_and_others_are_refused(prepared, data, monkeypatch):
    from reproduce import text_streams

    monkeypatch.setattr(text_streams, "write_streams", None)  # calling it would fail
    prepare(prepared, data, **SIZES)
    with pytest.raises(ValueError, match=r"'asked_vocabulary': 300.*'asked_vocabulary': 400"):
        prepare(prepared, data, **SIZES | {"vocabulary": 400})
    with pytest.raises(ValueError, match=r"holds texts made with \{'source': 'corpus0: 4 files"):
        prepare_small(prepared)
    with pytest.raises(FileExistsError, match="something else than texts"):
        prepare(data, data, **SIZES)


def test_a_failure_leaves_nothing_half_written(data, tmp_path, monkeypatch):
    from reproduce import text_streams

    monkeypatch.delattr(text_streams, "write_text")  # after the streams, before texts.json
    with pytest.raises(NameError):
        prepare(tmp_path / "texts", data, **SIZES)
    assert not any(tmp_path.iterdir())


def test_without_data_the_text_is_what_is_installed(tmp_path, monkeypatch):
    from apex_composer.demo import embedded

    limits = []

    def write(out, domain_limit):
        limits.append(domain_limit)
        return write_corpus(out)

    monkeypatch.setattr(embedded, "write_embedded_corpus", write)
    prepare(tmp_path / "texts", None, **SIZES)
    facts = load(tmp_path / "texts").facts
    assert (facts["source"], limits) == ("text installed with Python", [10_000_000])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vocabulary", 65_537, "vocabulary=65537 must be from 259, .* to 65536"),
        ("vocabulary", 258, "vocabulary=258"),
        ("domain_bytes", 0, "domain_bytes=0 must be at least 1"),
        ("held_out_tokens", 0, "held_out_tokens=0 must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_read(name, value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "texts", tmp_path / "missing", **SIZES | {name: value})


def test_a_third_of_a_small_domain_is_held_out_at_most_and_it_is_said(data, tmp_path, capsys):
    prepare(tmp_path / "texts", data, **SIZES | {"held_out_tokens": 4500})
    counts = load(tmp_path / "texts").facts["domains"]
    held_out = counts["book"]["held_out"]
    assert f"book: {held_out:,} tokens are held out, not 4,500" in capsys.readouterr().err
    assert 0.25 < held_out / sum(counts["book"].values()) < 0.35
    assert counts["github"]["held_out"] >= 4500


def test_a_domain_that_cannot_be_divided_is_named(data, tmp_path):
    write_jsonl(tmp_path / "arxiv" / "few.jsonl", [sentences(200), sentences(201)])
    write_jsonl(tmp_path / "book" / "many.jsonl", [sentences(seed) for seed in range(40)])
    with pytest.raises(ValueError, match="'arxiv' has 2 different documents.* to held_out"):
        prepare(tmp_path / "texts", tmp_path, **SIZES)


def test_pages_of_this_repository_are_small_texts(tmp_path):
    for name in ("texts", "again"):
        prepare_small(tmp_path / name)
    loaded = load(tmp_path / "texts")
    assert loaded.hash == load(tmp_path / "again").hash
    assert (loaded.domains, loaded.vocabulary) == (("first_pages", "other_pages"), 300)
    for domain, counts in loaded.facts["domains"].items():
        assert counts["held_out"] >= 4000 and counts["continued"] >= 10_000, domain
        assert counts["base"] >= 20_000, domain


def test_loading_needs_numpy_alone(prepared, monkeypatch):
    for name in ("apex_composer", "reproduce.text_streams", "tokenizers", "torch", "tqdm"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    monkeypatch.delitem(sys.modules, "reproduce.texts")
    loaded = importlib.import_module("reproduce.texts").load(prepared)
    assert loaded.domains == DOMAINS and len(loaded.hash) == 64
    assert isinstance(loaded.streams["base"]["book"], np.memmap)


def test_the_hash_is_that_of_the_streams(prepared):
    from reproduce.texts import hash_streams

    loaded = load(prepared)
    assert hash_streams(loaded.streams) == loaded.hash
    changed = {s: {d: np.array(own) for d, own in loaded.streams[s].items()} for s in SPLITS}
    changed["held_out"]["book"][7] ^= 1
    assert hash_streams(changed) != loaded.hash


def test_texts_that_are_missing_or_damaged_are_not_loaded(copied, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"texts.json does not exist.*reproduce/texts.py"):
        load(tmp_path / "missing")
    changed = np.array(np.load(copied / "held_out" / "book.npy"))
    changed[7] ^= 1
    np.save(copied / "held_out" / "book.npy", changed)
    with pytest.raises(ValueError, match="its streams are not those that texts.json has the hash"):
        load(copied)
    np.save(copied / "base" / "book.npy", np.zeros(3, np.uint16))
    with pytest.raises(ValueError, match=r"book.npy holds uint16 of shape \(3,\), texts.json says"):
        load(copied)
    (copied / "base" / "book.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"book.npy does not exist"):
        load(copied)


def test_windows_predict_every_token_once(prepared):
    loaded = load(prepared)
    for domain, own in windows(loaded, "base", 32).items():
        stream = loaded.streams["base"][domain]
        assert own.shape == ((len(stream) - 1) // 32, 33) and own.dtype == np.uint16
        assert np.shares_memory(own, stream) and not own.flags.writeable
        predicted = own[:, 1:].reshape(-1)
        assert (predicted == stream[1 : 1 + len(predicted)]).all()
        assert (own[:, 0] == stream[:-1][::32][: len(own)]).all()
    with pytest.raises(ValueError, match=r"held_out/book has \d+ tokens, a window of length=9999"):
        windows(loaded, "held_out", 9999)


def test_the_script_prints_what_it_prepared(data, tmp_path, capsys):
    numbers = ["--vocabulary", "300", "--held-out-tokens", "2000"]
    main([str(tmp_path / "texts"), "--data", str(data), *numbers])
    assert json.loads(capsys.readouterr().out) == load(tmp_path / "texts").facts
