"""Files, splits and rejects of a whole preparation; killed, resumed and done again."""

import json
import multiprocessing
import os
import signal

import pytest
from chats import (
    CHATML,
    LENGTH,
    chat,
    instruct,
    pair_line,
    rejects,
    tulu_line,
    write_records,
    written,
)
from corpus import sentences
from datasets import load_dataset
from prepared import file_hashes

from apex_composer.data_prep import pieces, verify_instruct
from apex_composer.data_prep.errors import InputNotFoundError, OutputTakenError, SettingsError
from apex_composer.data_prep.instruct import preparation


@pytest.fixture
def corpus(tmp_path):
    """Files of several pieces and of all kinds of compression."""
    lines = [tulu_line(number) for number in range(60)]
    write_records(tmp_path / "in" / "a.jsonl", lines[:30])
    write_records(tmp_path / "in" / "more" / "b.jsonl.gz", lines[30:45])
    write_records(tmp_path / "in" / "more" / "c.jsonl.zst", lines[45:])
    return tmp_path / "in"


def conversations(out):
    """The examples of every split."""
    return {
        split: {json.dumps(e) for e in written(out, split)} for split in ("train", "validation")
    }


def test_every_example_is_written_once_as_it_was_read(corpus, tmp_path):
    manifest = instruct(corpus, tmp_path / "out")
    both = written(tmp_path / "out") + written(tmp_path / "out", "validation")
    key = json.dumps
    assert sorted(both, key=key) == sorted(
        ({"messages": tulu_line(number)["messages"]} for number in range(60)), key=key
    )
    counts = manifest["splits"]
    assert {split: set(sources) for split, sources in counts.items()} == dict.fromkeys(
        ("train", "validation"), {"flan_v2", "lima", "open_orca"}
    )
    for split, sources in counts.items():
        assert sum(c["examples"] for c in sources.values()) == len(written(tmp_path / "out", split))
        assert sum(manifest["lengths"][split].values()) == len(written(tmp_path / "out", split))
    assert 60 * 0.1 < len(written(tmp_path / "out", "validation")) < 60 * 0.35
    assert rejects(tmp_path / "out") == [] and not (tmp_path / "out" / ".work").exists()


def test_no_example_changes_its_split_for_other_files_or_more_data(corpus, tmp_path):
    instruct(corpus, tmp_path / "out")
    lines = [tulu_line(number) for number in reversed(range(80))]
    lines = [{"id": "other", "dataset": "other", "messages": line["messages"]} for line in lines]
    write_records(tmp_path / "one.jsonl.gz", lines)
    instruct(tmp_path / "one.jsonl.gz", tmp_path / "more", template=CHATML, sequence_length=200)
    before, after = conversations(tmp_path / "out"), conversations(tmp_path / "more")
    assert all(before[split] < after[split] for split in before)
    instruct(corpus, tmp_path / "third", validation_share=0.5)
    assert before["validation"] < conversations(tmp_path / "third")["validation"]


def test_the_same_settings_give_the_same_bytes_with_any_number_of_workers(corpus, tmp_path):
    instruct(corpus, tmp_path / "out")
    instruct(corpus, tmp_path / "again", workers=2)
    assert file_hashes(tmp_path / "again") == file_hashes(tmp_path / "out")


def test_unusable_lines_are_listed_by_file_and_line(tmp_path):
    good, long = tulu_line(0), tulu_line(1) | {"messages": chat("a ?", "b " * LENGTH)}
    odd = good | {"messages": good["messages"][::-1]}
    spelled = good | {"messages": chat("a?", "b.<|end_of_text|>")}
    a = write_records(tmp_path / "in" / "a.jsonl", [good, b"{", b"", good, long] + [good] * 40)
    with a.open("ab") as file:
        file.write(b'{"messages": \xff}\n["a"]\n{"messages"')
    b = write_records(tmp_path / "in" / "b.jsonl.gz", [odd, good, spelled, {"messages": []}])
    manifest = instruct(tmp_path / "in", tmp_path / "out", max_reject_rate=0.5)
    assert a.stat().st_size > 3 * 2000  # pieces of it
    found = [(e["file"], e["line"], e["reason"], e["source"]) for e in rejects(tmp_path / "out")]
    assert found == [
        (str(a), 2, "broken JSON", "unnamed"),
        (str(a), 5, "longer than the sequence length", "open_orca"),
        (str(a), 46, "invalid UTF-8", "unnamed"),
        (str(a), 47, "no text", "unnamed"),
        (str(a), 48, "cut short at the end of the file", "unnamed"),
        (str(b), 1, "roles out of order", "flan_v2"),
        (str(b), 3, "text that spells a special token", "flan_v2"),
        (str(b), 4, "no answer", "unnamed"),
    ]
    assert sum(sum(reasons.values()) for reasons in manifest["rejects"].values()) == len(found)
    (sources,) = manifest["splits"].values()  # copies stay together
    assert sources["flan_v2"]["examples"] == 43
    with pytest.raises(ValueError, match=r"8 of 51 lines.*\n.*a.jsonl:2: broken JSON"):
        instruct(tmp_path / "in", tmp_path / "strict", max_reject_rate=0.1)
    # The tokens are kept: only the end is done again.
    instruct(tmp_path / "in", tmp_path / "strict", max_reject_rate=0.2)
    assert file_hashes(tmp_path / "strict") == file_hashes(tmp_path / "out")


def test_an_input_of_both_kinds_is_refused_with_the_places(tmp_path):
    write_records(tmp_path / "in" / "chats.jsonl", [tulu_line(0)])
    write_records(tmp_path / "in" / "pairs.jsonl", [pair_line(0)])
    message = "both kinds.*messages: .*chats.jsonl.*prompt and response: .*pairs.jsonl"
    with pytest.raises(ValueError, match=message):
        instruct(tmp_path / "in", tmp_path / "out")
    write_records(tmp_path / "in" / "chats.jsonl", [])
    instruct(tmp_path / "in", tmp_path / "out", overwrite=True)
    write_records(tmp_path / "in" / "pairs.jsonl", [])
    with pytest.raises(ValueError, match="no example"):
        instruct(tmp_path / "in", tmp_path / "empty")


def test_dates_that_the_loader_would_rewrite_are_refused(tmp_path, monkeypatch):
    lines = [pair_line(number) for number in range(40)]
    dates = [{"prompt": f"{sentences(n, 9)} ?", "response": f"2020-01-{n + 10}"} for n in range(20)]
    write_records(tmp_path / "in" / "a.jsonl", lines + dates)
    instruct(tmp_path / "in", tmp_path / "out", validation_share=0)  # read at once: texts
    monkeypatch.setattr(preparation, "LINES_AT_ONCE", 1000)
    cache = str(tmp_path / "cache")
    read = load_dataset(
        "json", data_files=str(tmp_path / "out" / "train.jsonl"), chunksize=1000, cache_dir=cache
    )["train"]
    assert read[59]["response"] == "2020-01-29 00:00:00"
    with pytest.raises(ValueError, match=r"train.jsonl: in the lines \d+ to 60 .*dates.*messages"):
        instruct(tmp_path / "in", tmp_path / "out", validation_share=0, overwrite=True)
    chats = [{"messages": chat(*line.values())} for line in lines + dates]
    write_records(tmp_path / "in" / "a.jsonl", chats)
    instruct(tmp_path / "in", tmp_path / "out", validation_share=0, overwrite=True)


def test_a_split_without_examples_has_no_file(corpus, tmp_path):
    manifest = instruct(corpus, tmp_path / "out", validation_share=0)
    assert list(manifest["splits"]) == ["train"] and len(written(tmp_path / "out")) == 60
    assert not (tmp_path / "out" / "validation.jsonl").exists()


def test_nothing_left_to_train_on_is_refused(tmp_path):
    write_records(tmp_path / "in" / "a.jsonl", [tulu_line(0)])
    with pytest.raises(ValueError, match="held out for validation, none is left to train on"):
        instruct(tmp_path / "in", tmp_path / "out", validation_share=0.999999)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_input_that_is_no_jsonl_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train-00000.parquet").write_bytes(b"PAR1")
    for name in ("in", "in/train-00000.parquet"):
        with pytest.raises(InputNotFoundError, match="no .jsonl.*to_json"):
            instruct(tmp_path / name, tmp_path / "out")
    with pytest.raises(InputNotFoundError, match="absent' does not exist. Give a .jsonl, "):
        instruct(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "in" / "a.jsonl.xz").write_bytes(b"")
    with pytest.raises(ValueError, match="a.jsonl.xz is named or compressed"):
        instruct(tmp_path / "in", tmp_path / "out")


class Killed(BaseException):
    """What a test ends a run with."""


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(corpus, tmp_path, monkeypatch):
    instruct(corpus, tmp_path / "whole")
    written_pieces, number = preparation.write_piece, 0

    def one_piece_more(task, report_progress):
        nonlocal number
        number += 1
        if number % 2 == 0:
            raise Killed
        return written_pieces(task, report_progress)

    monkeypatch.setattr(preparation, "write_piece", one_piece_more)
    out, rounds = tmp_path / "out", 0
    while not (out / "manifest.json").exists():
        rounds += 1
        try:
            instruct(corpus, out)
        except Killed:
            done = len(list((out / ".work" / "pieces").iterdir()))
            assert done == rounds and not (out / "train.jsonl").exists()
    assert rounds > 5
    assert file_hashes(out) == file_hashes(tmp_path / "whole")


@pytest.mark.parametrize("name", ["train.jsonl", "manifest.json"])
def test_a_kill_while_the_output_is_written_leaves_no_half_file(corpus, tmp_path, name):
    out = tmp_path / "out"
    instruct(corpus, tmp_path / "whole")
    process = multiprocessing.get_context("fork").Process(target=die_at, args=(corpus, out, name))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (out / name).exists() and list(out.glob(f"{name}.partial-*"))
    instruct(corpus, out)
    assert file_hashes(out) == file_hashes(tmp_path / "whole")


def die_at(corpus, out, name):
    """Prepare, and be killed before a file gets its name."""
    replace = os.replace

    def die(source, target):
        if os.path.basename(target) == name:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = die
    instruct(corpus, out)


def test_done_is_done_and_other_settings_are_refused(corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    manifest = instruct(corpus, out)
    monkeypatch.setattr(preparation, "tokenise_pieces", None)  # is not called again
    assert instruct(corpus, out, max_reject_rate=0.9) == manifest
    for changes, message in (
        ({"sequence_length": 64}, "sequence_length was 128 and is now 64"),
        ({"validation_share": 0.1}, "validation_share was 0.2 and is now 0.1"),
        ({"kind": "prepend"}, "tokenizer differs in tokenizer/.*tokenizer.json"),
        ({"chat_template": "tulu"}, "chat_template was None and is now 'tulu'"),
    ):
        with pytest.raises(SettingsError, match=message):
            instruct(corpus, out, **changes)
    (out / "train.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match="train.jsonl is gone or cut short.*--overwrite"):
        instruct(corpus, out)
    monkeypatch.undo()
    assert instruct(corpus, out, overwrite=True) == manifest
    write_records(corpus / "a.jsonl", [tulu_line(0)])
    write_records(corpus / "more" / "d.jsonl", [tulu_line(0)])
    with pytest.raises(SettingsError, match=r"input differs in \S*a.jsonl, \S*d.jsonl\. Give"):
        instruct(corpus, out)


def test_another_tokenizer_in_the_same_process_counts_its_own_tokens(corpus, tmp_path):
    instruct(corpus, tmp_path / "out")
    manifest = instruct(corpus, tmp_path / "out", kind="prepend", overwrite=True)
    assert manifest == instruct(corpus, tmp_path / "fresh", kind="prepend")


def test_an_unfinished_run_is_not_continued_with_other_settings(corpus, tmp_path, monkeypatch):
    def stop(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(preparation, "check_rejects", stop)
        instruct(corpus, tmp_path / "out")
    with pytest.raises(SettingsError, match="sequence_length was 128 and is now 64"):
        instruct(corpus, tmp_path / "out", sequence_length=64)
    instruct(corpus, tmp_path / "out", sequence_length=200, overwrite=True)
    assert verify_instruct(tmp_path / "out", workers=1) == []


def test_what_others_have_written_is_left_alone(corpus, tmp_path):
    from prepared import tokenizer_folder

    with pytest.raises(OutputTakenError, match="was not written by this command"):
        instruct(corpus, tokenizer_folder(), overwrite=True)
    with pytest.raises(SettingsError, match="one in the other"):
        instruct(corpus, corpus / "out")


def test_input_that_changes_meanwhile_is_refused(corpus, tmp_path, monkeypatch):
    whole = pieces.tokenise_pieces

    def append(*arguments):
        whole(*arguments)
        write_records(corpus / "new.jsonl", [tulu_line(99)])

    monkeypatch.setattr(preparation, "tokenise_pieces", append)
    with pytest.raises(ValueError, match="changed while it was read"):
        instruct(corpus, tmp_path / "out")


def test_an_engine_that_fails_leaves_what_should_be_overwritten(corpus, tmp_path, monkeypatch):
    def fail(*arguments):
        raise SettingsError("no Ray cluster")

    instruct(corpus, tmp_path / "out")
    before = file_hashes(tmp_path / "out")
    monkeypatch.setattr(preparation.Engine, "opened", fail)
    with pytest.raises(SettingsError, match="no Ray cluster"):
        instruct(corpus, tmp_path / "out", overwrite=True)
    assert file_hashes(tmp_path / "out") == before
