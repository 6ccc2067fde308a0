import json
import shutil
from dataclasses import asdict

import pytest
from corpus import write_corpus
from hypothesis import given
from hypothesis import strategies as st
from prepared import run, small_options, tokenizer_folder

from apex_composer.data_prep import prepare
from apex_composer.data_prep.atomic_files import write_json
from apex_composer.data_prep.choose.job_plan import (
    Plan,
    date_source,
    make_pieces,
    read_plan,
    source_differences,
    write_plan,
)
from apex_composer.data_prep.errors import SettingsError
from apex_composer.data_prep.options import Options
from apex_composer.data_prep.paths import PLAN
from apex_composer.data_prep.read.sources import Source
from apex_composer.data_prep.tokens.document_hash import FIRST_HASH, NEWEST_HASH
from apex_composer.data_prep.tokens.tokenizer import TokenizerFacts


def source(path, size=0, splittable=True):
    return Source(str(path), "book", "jsonl", size, splittable)


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=5), st.integers(1, 60))
def test_pieces_cover_every_file_once_and_in_order(files, piece_bytes):
    sources = [source(name, size, splittable) for name, (size, splittable) in enumerate(files)]
    pieces = make_pieces(sources, piece_bytes)
    assert [piece.source for piece in pieces] == sorted(piece.source for piece in pieces)
    for number, (size, splittable) in enumerate(files):
        own = [piece for piece in pieces if piece.source == number]
        assert [piece.stop for piece in own] == [*(piece.start for piece in own[1:]), None]
        assert own[0].start == 0 and max(0, own[-1].start) <= max(0, size - 1)
        assert len(own) == (max(1, -(-size // piece_bytes)) if splittable else 1)


def test_a_plan_is_read_as_it_was_written(tmp_path):
    (tmp_path / "x.jsonl").write_text("{}")
    sources = [source(tmp_path / "x.jsonl", 2), source("s3://bucket/x.jsonl", splittable=False)]
    plan = Plan(
        Options(proportions={"book": 1.0}, train_tokens=5000),
        TokenizerFacts("name", "0" * 64, 320, None, 1),
        [date_source(file) for file in sources],
        make_pieces(sources, 1),
        {"book": 0.25},
        NEWEST_HASH,
    )
    write_plan(tmp_path, plan)
    assert read_plan(tmp_path) == plan
    assert plan.sources[0].modified_ns and plan.sources[1].modified_ns is None


def test_a_plan_without_a_hash_is_one_of_the_first_and_an_unknown_one_is_refused(tmp_path):
    plan = Plan(Options(), TokenizerFacts("name", "0" * 64, 320, None, 1), [], [], {}, FIRST_HASH)
    content = asdict(plan) | {"format": "apex-composer plan 2"}
    del content["document_hash"]
    write_json(tmp_path / PLAN, content)
    assert read_plan(tmp_path) == plan
    for name in ("plan 3", "plan 4"):
        content |= {"format": f"apex-composer {name}", "document_hash": "md5"}
        write_json(tmp_path / PLAN, content)
        with pytest.raises(
            SettingsError, match=f"another version .'apex-composer {name}', .*'md5'"
        ):
            read_plan(tmp_path)


def test_the_differences_of_two_inputs_are_named(tmp_path):
    kept, changed = tmp_path / "kept", tmp_path / "changed"
    for path in (kept, changed):
        path.write_text("x")
    before = [date_source(source(path)) for path in (kept, changed, "gone")]
    changed.write_text("xy")
    now = [source(kept), source(changed, 1), source("new")]
    assert source_differences(before, now) == [
        "gone is gone", "new is new", f"{changed} has changed",
    ]  # fmt: skip


def test_other_options_and_other_input_are_refused_by_name(prepared, tmp_path):
    folder, _ = prepared
    with pytest.raises(SettingsError, match="train_tokens was 1920 and is now 960"):
        run(folder / "corpus", folder / "out", train_tokens=960)
    other = write_corpus(tmp_path / "corpus", documents=80)
    with pytest.raises(SettingsError, match="is gone"):
        run(other, folder / "out")


def test_a_begun_preparation_is_only_continued_with_the_same_options(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=80)
    run(corpus, tmp_path / "out", shard=(1, 2))
    with pytest.raises(SettingsError, match="sequence_length was 32 and is now 16"):
        run(corpus, tmp_path / "out", sequence_length=16)


def test_a_begun_preparation_is_not_continued_with_another_end_of_documents(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=80)
    run(corpus, tmp_path / "out", shard=(1, 2))
    other = shutil.copytree(tokenizer_folder(), tmp_path / "tokenizer")
    settings = json.loads((other / "tokenizer_config.json").read_text())
    settings["eos_token"] = settings["pad_token"]
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    (other / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(SettingsError, match="the tokenizer's eos was 1 and is now 2"):
        prepare(corpus, tmp_path / "out", tokenizer=other, options=small_options(), workers=1)
