"""What the output folder may hold, and who may write to it."""

import errno
import json
import shutil
from pathlib import Path

import pytest
from corpus import sentences, write_corpus, write_jsonl
from hub_folders import dolma_record, write_arrow
from prepared import file_hashes, run, small_options, tokenizer_folder

from apex_composer.data_prep import output_folder, prepare, read_manifest
from apex_composer.data_prep.errors import OutputTakenError, SettingsError


def test_only_its_own_output_is_replaced(prepared, tmp_path):
    folder, _ = prepared
    (tmp_path / "thesis.txt").write_text("mine")
    arguments = {"tokenizer": tokenizer_folder(), "workers": 1, "overwrite": True}
    with pytest.raises(FileExistsError, match="was not written by this command"):
        prepare(folder / "corpus", tmp_path, options=small_options(), **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture(scope="module")
def with_work(prepared, tmp_path_factory):
    """A finished preparation whose working folder was kept."""
    out = tmp_path_factory.mktemp("with-work") / "out"
    arguments = {"tokenizer": tokenizer_folder(), "options": small_options(), "workers": 1}
    prepare(prepared[0] / "corpus", out, keep_work=True, **arguments)
    return out


@pytest.mark.parametrize("gone", ["train", "tokenizer", "pieces"])
def test_an_overwrite_that_was_killed_is_done_again(
    prepared, with_work, tmp_path, monkeypatch, gone
):
    folder, _ = prepared
    out = shutil.copytree(with_work, tmp_path / "out")
    arguments = {"tokenizer": tokenizer_folder(), "options": small_options(), "workers": 1}

    def killed(path, *arguments, **names):
        if Path(path).name == gone:
            raise KeyboardInterrupt
        whole(path, *arguments, **names)

    whole = shutil.rmtree
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(output_folder.shutil, "rmtree", killed)
        prepare(folder / "corpus", out, overwrite=True, **arguments)
    assert read_manifest(out) is None
    run(folder / "corpus", out)
    assert file_hashes(out) == file_hashes(folder / "out")


def test_a_finished_output_that_has_lost_a_shard_is_not_called_done(prepared, tmp_path):
    folder, _ = prepared
    out = shutil.copytree(folder / "out", tmp_path / "out")
    (out / "train" / "book" / "shard.00000.mds").unlink()
    with pytest.raises(ValueError, match="1 of its shards are gone or cut short"):
        run(folder / "corpus", out)


def test_an_output_in_the_input_is_refused(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    for out in (corpus / "prepared", tmp_path, corpus):
        with pytest.raises(SettingsError, match="lie one in the other"):
            run(corpus, out)
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="is a file"):
        run(corpus, tmp_path / "file")


def test_one_writer_at_a_time_but_for_the_parts_of_a_job(tmp_path):
    corpus, out = write_corpus(tmp_path / "corpus", documents=80), tmp_path / "out"
    with output_folder.locked(out, (1, 2)):
        run(corpus, out, shard=(2, 2))
        for shard in (None, (1, 2), (2, 3)):
            with pytest.raises(OutputTakenError):
                run(corpus, out, shard=shard)
    with (
        output_folder.locked(out, None),
        pytest.raises(OutputTakenError, match="by another process"),
    ):
        run(corpus, out, shard=(1, 2))
    run(corpus, out)


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(output_folder.fcntl, "flock", no_locks)
    corpus, out = write_corpus(tmp_path / "corpus", documents=80), tmp_path / "out"
    with pytest.warns(UserWarning, match="this file system has no locks"):
        run(corpus, out, shard=(1, 2))
        # Nobody knows whether the other part is at work here: nothing of it may be removed.
        other = out / ".work" / "pieces" / "000001.partial-abc" / "tokens.bin"
        other.parent.mkdir()
        other.touch()
        (out / ".work" / "plan.json").rename(tmp_path / "plan.json")
        run(corpus, out, shard=(1, 2))
    assert other.exists() and (out / ".work" / "pieces" / "000000").is_dir()
    with pytest.warns(UserWarning):
        run(corpus, out)
    assert read_manifest(out) is not None


def test_parts_of_an_array_job_do_not_start_over(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=80)
    arguments = {"tokenizer": tokenizer_folder(), "options": small_options(), "workers": 1}
    with pytest.raises(SettingsError, match="would remove what other parts have done"):
        prepare(corpus, tmp_path / "out", shard=(1, 2), overwrite=True, **arguments)


@pytest.mark.parametrize("file", ["manifest.json", ".work/plan.json"])
def test_the_work_of_another_version_is_refused_and_may_be_replaced(
    prepared, with_work, tmp_path, file
):
    folder, _ = prepared
    arguments = {"tokenizer": tokenizer_folder(), "options": small_options(), "workers": 1}
    out = shutil.copytree(with_work, tmp_path / "out")
    if file != "manifest.json":
        (out / "manifest.json").unlink()
    content = json.loads((out / file).read_text())
    content["format"] = content["format"][:-1] + "0"
    (out / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="0'.*--overwrite"):
        prepare(folder / "corpus", out, **arguments)
    prepare(folder / "corpus", out, overwrite=True, **arguments)
    assert file_hashes(out) == file_hashes(folder / "out")


def test_what_was_begun_goes_on_in_the_format_that_was_found_then(tmp_path, monkeypatch):
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    records = [dolma_record(sentences(seed)) for seed in range(80)]
    write_jsonl(corpus / "book" / "x.jsonl", records)
    with monkeypatch.context() as patch:  # a version that knows neither dolma nor arrow
        patch.setattr(
            "apex_composer.data_prep.read.sources.detect_format", lambda *found: "redpajama-v1"
        )
        run(corpus, out, shard=(1, 2), cpt_tokens=None)
    write_arrow(corpus / "stray" / "x.arrow", {"text": ["a"]})
    for _ in range(2):  # in the midst, and when it is finished
        assert list(run(corpus, out, cpt_tokens=None)["domains"]) == ["book"]
    with pytest.raises(SettingsError, match="several formats .*arrow.*--format"):
        prepare(corpus, out, options=small_options(), tokenizer=tokenizer_folder(), overwrite=True)
