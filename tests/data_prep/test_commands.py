import shutil
import subprocess
import sys
import time

import pytest
from corpus import write_corpus, write_jsonl
from prepared import file_hashes, tokenizer_folder
from typer.testing import CliRunner

from apex_composer.data_prep import dry_run
from apex_composer.data_prep.__main__ import app

BUDGETS = ["--seq-len", "32", "--val-tokens", "640", "--train-tokens", "1920"]


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus", documents=80)


def call(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


def prep(corpus, out, *arguments):
    common = ["--out", out, "--tokenizer", tokenizer_folder(), "--workers", "1", *BUDGETS]
    return call("prep", corpus, *common, *arguments)


@pytest.mark.parametrize("command", ["prep", "prep-instruct", "prep-merge", "prep-verify"])
def test_help_comes_within_two_seconds_without_torch(command):
    program = (
        "import sys; from apex_composer.cli import app\n"
        f"sys.argv = ['apex-composer', '{command}', '--help']\n"
        "try: app()\n"
        "finally: assert not {'torch', 'transformers', 'streaming', 'ray'} & set(sys.modules)"
    )
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0 and "Usage" in result.stdout, result.stderr
    assert time.monotonic() - started < 2


def test_done_is_0_and_verify_tells_damage_by_1(corpus, tmp_path):
    out = tmp_path / "out"
    status, output = prep(corpus, out)
    assert status == 0 and "train/github: " in output
    assert "absent, so the others' proportions were raised: cc, c4" in output
    assert call("prep-verify", out, "--workers", "1")[0] == 0
    shard = out / "train" / "book" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    status, output = call("prep-verify", out, "--workers", "1")
    assert status == 1 and "error: train/book/shard.00000.mds" in output


def test_the_result_is_uploaded_and_streams_name_the_store(corpus, tmp_path):
    import yaml

    store = tmp_path / "store"
    out = tmp_path / "out"
    status, output = prep(corpus, out, "--upload", f"file://{store}")
    assert status == 0 and "uploaded: " in output
    assert file_hashes(store) == file_hashes(out)
    block = next(iter(yaml.safe_load_all((store / "streams.yaml").read_text())))
    assert block["streams"]["book"]["remote"] == f"file://{store}/validation/book"
    status, output = prep(corpus, out, "--upload", str(store))
    assert status == 2 and "must be an address" in output


def test_an_array_job_and_its_merge(corpus, tmp_path):
    out = tmp_path / "out"
    assert prep(corpus, out, "--shard", "1/2")[0] == 0
    status, output = call("prep-merge", out)
    assert status == 2 and "pieces are not done" in output
    assert prep(corpus, out, "--shard", "2/2")[0] == 0
    assert call("prep-merge", out, "--workers", "1")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--val-tokens", "2 GB"], "is no amount"),
        (["--seq-len", "1"], "sequence_length=1"),
        (["--shard", "4/3"], "shard=4/3"),
        (["--shard", "first"], "must be I/N"),
        (["--proportions", "llama9"], "neither 'llama1' nor a file"),
        (["--tokenizer", "no/such-tokenizer"], "tokenizer='no/such-tokenizer' cannot be loaded"),
        (["--workers", "0"], "workers=0"),
        (["--upload", "ftp://host/x"], "of no store that streaming knows"),
        (["--val-tokens", "32"], "no sequence of 32 tokens for validation/github"),
    ],
)
def test_a_wrong_command_line_is_2_and_writes_nothing(corpus, tmp_path, arguments, message):
    status, output = prep(corpus, tmp_path / "out", *arguments)
    assert status == 2 and message in output
    assert not (tmp_path / "out").exists()


def test_broken_files_on_the_command_line_are_2(corpus, tmp_path):
    (tmp_path / "p.yaml").write_text("{cc: [")
    status, output = prep(corpus, tmp_path / "out", "--proportions", str(tmp_path / "p.yaml"))
    assert status == 2 and "p.yaml" in output
    broken = shutil.copytree(tokenizer_folder(), tmp_path / "tokenizer")
    (broken / "tokenizer.json").write_text("{")
    status, output = prep(corpus, tmp_path / "out", "--tokenizer", str(broken))
    assert status == 2 and "cannot be loaded" in output


def test_no_training_tokens_at_all_is_2(corpus, tmp_path):
    status, output = prep(corpus, tmp_path / "out", "--train-tokens", "0", "--cpt-tokens", "0")
    assert status == 2 and "leaves no training data" in output


def test_absent_input_and_strange_domains_are_2(tmp_path):
    status, output = prep(tmp_path / "absent", tmp_path / "out")
    assert status == 2 and "absent" in output
    write_corpus(tmp_path / "corpus")
    write_jsonl(tmp_path / "corpus" / "poems" / "x.jsonl", ["text " * 100])
    status, output = prep(tmp_path / "corpus", tmp_path / "out")
    assert status == 2 and "no entry for poems" in output


def test_damaged_data_is_1_and_names_the_file(corpus, tmp_path):
    archive = corpus / "github" / "b.jsonl.gz"
    archive.write_bytes(archive.read_bytes()[:-9])
    status, output = prep(corpus, tmp_path / "out")
    assert status == 1 and str(archive) in output
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_dry_run_tells_tokens_disk_and_time_and_writes_nothing(corpus, tmp_path, monkeypatch):
    status, output = prep(corpus, tmp_path / "out", "--dry-run")
    assert status == 0
    assert "book 80 " in output and "disk: " in output and "time: about" in output
    full = dry_run.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda path: full)
    status, output = prep(corpus, tmp_path / "out", "--dry-run")
    assert status == 1 and "is too small" in output
    assert not (tmp_path / "out").exists()
