import pytest
from chats import tokenizer_folder, tulu_line, write_records
from corpus import write_corpus
from prepared import run
from typer.testing import CliRunner

from apex_composer.data_prep.__main__ import app


@pytest.fixture
def chats(tmp_path):
    lines = [tulu_line(number) for number in range(30)]
    return write_records(tmp_path / "tulu.jsonl", [*lines, b"{"])


def call(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


def prep(chats, out, *arguments):
    common = ["--out", out, "--tokenizer", tokenizer_folder(), "--workers", "1", "--seq-len", "128"]
    return call("prep-instruct", chats, *common, *arguments)


def test_done_is_0_shows_the_numbers_and_verify_tells_damage_by_1(chats, tmp_path):
    out = tmp_path / "out"
    status, output = prep(chats, out, "--val-share", "0.2", "--max-reject-rate", "0.1")
    assert status == 0, output
    for shown in ("open_orca", "longest", "rejected because", "broken JSON"):
        assert shown in output
    assert f"hf_name: {out}, max_seq_len: 128, tokenizer.name: {out}/tokenizer" in output
    status, output = call("prep-verify", out, "--workers", "1")
    assert status == 0 and f"{out} is as its manifest says" in output
    (out / "train.jsonl").write_bytes(b"")
    status, output = call("prep-verify", out, "--workers", "1")
    assert status == 1 and "error: train.jsonl: its bytes have changed" in output


def test_sources_are_shown_by_whatever_name_they_have(tmp_path):
    names = ("[/x]", ":cat:", "\ud83d")
    lines = [tulu_line(number) | {"dataset": name} for number, name in enumerate(names)]
    status, output = prep(write_records(tmp_path / "in.jsonl", lines), tmp_path / "out")
    assert status == 0, output
    assert "[/x]" in output and ":cat:" in output and "\u2502 ?" in output


def test_bad_data_is_1(chats, tmp_path):
    status, output = prep(chats, tmp_path / "out", "--max-reject-rate", "0")
    assert status == 1 and "tulu.jsonl:31: broken JSON" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq-len", "1"], "sequence_length=1 must be at least 2"),
        (["--val-share", "1"], "validation_share=1.0 must lie in [0, 1)"),
        (["--max-reject-rate", "-1"], "max_reject_rate=-1.0 must lie in [0, 1)"),
        (["--chat-template", "none"], "chat_template='none' cannot be read"),
        (["--tokenizer", "no/such"], "tokenizer='no/such' cannot be loaded"),
        (["--workers", "0"], "workers=0"),
    ],
)
def test_a_wrong_command_line_is_2_and_writes_nothing(chats, tmp_path, arguments, message):
    status, output = prep(chats, tmp_path / "out", *arguments)
    assert status == 2 and message in output
    assert not (tmp_path / "out").exists()


def test_prep_and_prep_instruct_do_not_write_over_each_other(chats, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", 80)
    run(corpus, tmp_path / "prep")
    status, output = prep(chats, tmp_path / "prep")
    assert status == 2 and "something else than instruction data" in output
    prep(chats, tmp_path / "instruct", "--max-reject-rate", "0.1")
    tokenizer = ["--tokenizer", tokenizer_folder(), "--out", tmp_path / "instruct"]
    status, output = call("prep", corpus, *tokenizer)
    assert status == 2 and "was not written by this command" in output
