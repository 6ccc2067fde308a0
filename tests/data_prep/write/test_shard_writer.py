"""Shards that any worker writes for itself are the stream of the documents, cut."""

import random
import shutil
import tracemalloc
from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_composer.data_prep.choose.document_index import Corpus, Stream
from apex_composer.data_prep.paths import PIECES, SHARDS, TOKENS, piece_folder
from apex_composer.data_prep.write.mds import ShardFormat, encode_shard
from apex_composer.data_prep.write.shard_writer import shard_tasks, stream_spans, write_shard

FORMAT = ShardFormat("uint16", 8, 400, None)
DOMAINS = ["book", "cc"]


@pytest.fixture
def pieces(tmp_path):
    """Documents in pieces on disk, some of them empty: the corpus, and the tokens by number."""
    drawn, documents, owners, first = random.Random(0), [], [], [0]
    for number, count in enumerate([0, 60, 1, 0, 90, 30]):
        lengths = [drawn.randint(1, 40) for _ in range(count)]
        texts = [np.array([drawn.randrange(999) for _ in range(n)], "uint16") for n in lengths]
        piece_folder(tmp_path, number).mkdir(parents=True)
        np.concatenate([*texts, np.empty(0, "uint16")]).tofile(
            piece_folder(tmp_path, number) / TOKENS
        )
        documents += texts
        owners += [drawn.randrange(2) for _ in texts]
        first.append(len(documents))
    lengths = np.array([len(tokens) for tokens in documents], dtype=np.uint32)
    owners = np.array(owners, dtype=np.uint16)
    return Corpus(DOMAINS, lengths, owners, np.array(first), []), documents


def test_shards_are_those_of_the_documents_laid_end_to_end(tmp_path, pieces):
    corpus, documents = pieces
    length, streams, expected = FORMAT.sequence_length, [], {}
    for number, domain in enumerate(DOMAINS):
        chosen = np.flatnonzero(corpus.owners == number)
        whole = np.concatenate([documents[n] for n in chosen])
        sequences = len(whole) // length - 1  # a budget leaves one more out
        streams.append(Stream("train", domain, chosen, len(whole), sequences, length))
        rows = whole[: sequences * length].reshape(-1, length)
        for start in range(0, sequences, FORMAT.sequences_per_shard):
            name = f"train/{domain}/shard.{start // FORMAT.sequences_per_shard:05d}.mds"
            part = rows[start : start + FORMAT.sequences_per_shard]
            expected[name] = encode_shard(part, FORMAT)
    written = {}
    for task in shard_tasks(tmp_path, corpus, streams, FORMAT):
        shard = write_shard(task, lambda tokens: None)
        written[shard["file"]] = (tmp_path / shard["file"]).read_bytes()
        assert shard["bytes"] == shard["raw_bytes"] == len(written[shard["file"]])
    assert written == expected and len(expected) > 20


def test_a_whole_shard_is_kept_and_a_damaged_one_written_again(tmp_path, pieces):
    corpus, _ = pieces
    stream = Stream("train", "book", np.arange(corpus.first[-1]), 0, 2, 0)
    [task] = shard_tasks(tmp_path, corpus, [stream], FORMAT)
    path = tmp_path / write_shard(task, lambda tokens: None)["file"]
    content, written = path.read_bytes(), path.stat().st_ino
    (tmp_path / SHARDS / f"{task['name']}.json").unlink()  # a kill between the two
    write_shard(task, lambda tokens: None)
    assert path.stat().st_ino == written
    path.write_bytes(content[:-1])
    write_shard(task, lambda tokens: None)
    assert path.read_bytes() == content


def test_a_shard_that_was_written_needs_no_pieces(tmp_path, pieces):
    corpus, _ = pieces
    stream = Stream("train", "book", np.arange(corpus.first[-1]), 0, 2, 0)
    [task] = shard_tasks(tmp_path, corpus, [stream], FORMAT)
    done, told = write_shard(task, lambda tokens: None), []
    shutil.rmtree(tmp_path / PIECES)
    assert write_shard(task, told.append) == done and told == [task["tokens"]]


def test_a_piece_that_is_cut_short_is_named(tmp_path, pieces):
    corpus, _ = pieces
    path = piece_folder(tmp_path, 4) / TOKENS
    path.write_bytes(path.read_bytes()[:-2])
    documents = np.arange(corpus.first[-1])
    tokens = int(corpus.lengths.sum())
    stream = Stream("train", "book", documents, tokens, tokens // FORMAT.sequence_length, 0)
    with pytest.raises(OSError, match=f"{path} is cut short. Remove {path.parent}"):
        for task in shard_tasks(tmp_path, corpus, [stream], FORMAT):
            write_shard(task, lambda tokens: None)


def test_places_beyond_four_billion_tokens_are_found(tmp_path):
    lengths = np.arange(2**32 - 12, 2**32, dtype=np.uint32)
    corpus = Corpus(["cc"], lengths, np.zeros(12, np.uint16), np.array([0, 5, 5, 12]), [])
    documents = np.array([1, 3, 4, 5, 10], dtype=np.uint32)
    ends, tokens = np.cumsum(lengths.tolist()).tolist(), int(lengths[documents].sum(dtype=int))
    format = ShardFormat("uint32", 1 << 31, 1 << 40, None)
    sequences = tokens // format.sequence_length
    stream = Stream("train", "cc", documents, tokens, sequences, 0)
    [task] = shard_tasks(tmp_path, corpus, [stream], format)
    cut = tokens - sequences * format.sequence_length
    assert task["reads"].tolist() == [
        [0, ends[0], lengths[1].item()],
        [0, ends[2], lengths[3].item() + lengths[4].item()],
        [2, 0, lengths[5].item()],
        [2, ends[9] - ends[4], lengths[10].item() - cut],
    ]


def test_the_places_of_all_documents_are_not_held_at_once(tmp_path):
    count = 200_000
    corpus = Corpus(
        ["cc"],
        np.full(count, 100, np.uint32),
        np.zeros(count, np.uint16),
        np.arange(0, count + 1, 500),
        [],
    )
    documents = np.arange(count, dtype=np.uint32)
    stream = Stream("train", "cc", documents, 100 * count, 100 * count // 8, 0)
    format = ShardFormat("uint16", 8, 1 << 18, None)
    tracemalloc.start()
    deque(shard_tasks(tmp_path, corpus, [stream], format), maxlen=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Of a stream the lengths, as int64 too, and where its documents end.
    assert peak < 22 * count


@given(st.lists(st.integers(1, 30), min_size=1), st.integers(1, 40), st.integers(0, 100))
def test_spans_are_the_stream_cut_into_equal_parts(lengths, per_shard, percent):
    total = sum(lengths) * percent // 100
    stream = np.concatenate([np.full(length, number) for number, length in enumerate(lengths)])
    parts = []
    for first, last, skipped, tokens in stream_spans(np.array(lengths), per_shard, total):
        whole = np.concatenate([np.full(lengths[n], n) for n in range(first, last)])
        assert skipped < lengths[first] and tokens <= per_shard
        parts.append(whole[skipped : skipped + tokens])
        assert len(parts[-1]) == tokens
    joined = np.concatenate(parts) if parts else stream[:0]
    assert joined.tolist() == stream[:total].tolist()
    assert all(len(part) == per_shard for part in parts[:-1])
