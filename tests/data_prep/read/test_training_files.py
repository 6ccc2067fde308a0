import json
import warnings

import datasets
import pytest
from hub_folders import (
    cache_dataset,
    save_dataset,
    save_splits,
    write_arrow,
    write_dolma,
    write_fineweb,
)
from reading import texts

from apex_composer.data_prep.errors import InputNotFoundError, SettingsError, SourceError
from apex_composer.data_prep.read.sources import find_sources


def names(folder, format="arrow"):
    """Files that are read without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sources = find_sources(folder, format)
    return [source.path[len(str(folder)) + 1 :] for source in sources]


def warned(folder, format="arrow"):
    """Files that are read with a warning that others are left out."""
    with pytest.warns(UserWarning, match="files of other splits than train are left out"):
        return [source.path[len(str(folder)) + 1 :] for source in find_sources(folder, format)]


def test_a_saved_data_set_is_what_its_state_lists(tmp_path):
    save_dataset(tmp_path, [["a"], ["b"]], split="test")  # given as the input itself
    write_arrow(tmp_path / "cache-0a1b.arrow", {"text": ["result of a map"]})
    assert names(tmp_path) == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(SourceError, match="data-00001-of-00002.arrow is listed in its state.json"):
        names(tmp_path)
    (tmp_path / "state.json").write_text('{"_indices_data_files": [{"filename": "i.arrow"}]}')
    with pytest.raises(SettingsError, match="selection of rows"):
        names(tmp_path)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(SourceError, match="state.json cannot be read"):
        names(tmp_path)


@pytest.mark.parametrize("state", ["[]", "{}", *(f'{{"_data_files": {x}}}' for x in (3, [], [3]))])
def test_a_state_that_lists_nothing_does_not_leave_its_folder_out_in_silence(tmp_path, state):
    save_dataset(tmp_path / "poems", [["a"]])
    save_dataset(tmp_path / "prose", [["b"]])
    (tmp_path / "prose" / "state.json").write_text(state)
    with pytest.raises(SourceError, match="prose/state.json lists no files as save_to_disk does"):
        names(tmp_path)


@pytest.mark.parametrize("address", ["", "file://"])
def test_of_splits_only_train_is_read(tmp_path, address):
    save_splits(tmp_path / "poems", {"train": ["a"], "test": ["b"], "unsupervised": ["c"]})
    expected = ["poems/train/data-00000-of-00001.arrow"]
    assert warned(f"{address}{tmp_path}") == expected
    assert warned(f"{address}{tmp_path}/poems") == [expected[0][len("poems/") :]]
    # Who gives the folder of a split wants it.
    assert names(f"{address}{tmp_path}/poems/test") == ["data-00000-of-00001.arrow"]
    save_splits(tmp_path / "prose", {"train": ["a"]})
    assert names(f"{address}{tmp_path}/prose") == ["train/data-00000-of-00001.arrow"]


def test_splits_are_no_domains(tmp_path):
    save_splits(tmp_path, {"wiki": ["a"], "books": ["b"]})
    with pytest.raises(SettingsError, match=r"the splits \['wiki', 'books'\], none of which is"):
        names(tmp_path)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "wiki"]}')
    with pytest.raises(SourceError, match="dataset_dict.json names the split train, which is not"):
        names(tmp_path)


def test_what_was_not_saved_to_its_end_is_an_error(tmp_path):
    save_dataset(tmp_path / "poems", [["a"], ["b"]])
    (tmp_path / "poems" / "state.json").unlink()
    (tmp_path / "poems" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(SourceError, match="poems/data-00000-of-00002.arrow has no state.json"):
        names(tmp_path)


def test_a_saved_split_is_told_by_its_folder_or_its_state(tmp_path):
    save_dataset(tmp_path / "a" / "train", [["a"]])
    save_dataset(tmp_path / "a" / "validation", [["b"]])
    save_dataset(tmp_path / "poems", [["c"]], split="test")
    save_splits(tmp_path / "test" / "prose", {"train": ["d"]})
    cache_dataset(tmp_path / "dev", {"x-train.arrow": ["e"]}, ["train"])
    assert warned(tmp_path) == ["a/train/data-00000-of-00001.arrow"]


def test_of_a_cache_only_train_is_read_and_no_result_of_a_map(tmp_path):
    files = {
        "wikitext-train-00000-of-00002.arrow": ["a"],
        "wikitext-train-00001-of-00002.arrow": ["b"],
        "wikitext-test.arrow": ["c"],
        "cache-0a1b.arrow": ["d"],
    }
    folder = tmp_path / "wikitext" / "default" / "0.0.0" / "0a1b0a1b0a1b0a1b"
    cache_dataset(folder, files, ["train", "test"])
    assert warned(folder) == list(files)[:2]
    (folder / "wikitext-train-00001-of-00002.arrow").unlink()
    with pytest.raises(SourceError, match=r"1 files of the split train .* \[2\].*again"):
        names(folder)
    cache_dataset(folder, {"wikitext-test.arrow": ["c"]}, ["test"])
    with pytest.raises(SettingsError, match=r"the splits \['test'\]"):
        names(folder)
    (folder / "dataset_info.json").write_text('{"splits": 3}')
    with pytest.raises(SettingsError, match="dataset_info.json names the splits 3, none"):
        names(folder)


def test_two_versions_of_a_cached_data_set_are_not_read_as_one(tmp_path):
    for config in ("de", "en"):
        folder = tmp_path / "poems" / config / "0.0.0" / "0a1b0a1b0a1b0a1b"
        cache_dataset(folder, {"poems-train.arrow": ["a"]}, ["train"])
    assert len(names(tmp_path)) == 2
    again = tmp_path / "poems" / "de" / "0.0.0" / "ffff0a1b0a1b0a1b"
    cache_dataset(again, {"poems-train.arrow": ["a"]}, ["train"])
    for input in (tmp_path, tmp_path / "poems" / "de"):
        with pytest.raises(SettingsError, match="two versions .*0a1b.* and .*ffff"):
            names(input)


def test_files_without_a_word_of_datasets_are_told_by_their_path(tmp_path):
    kept = ["poems/latest-1.arrow", "poems/x-train.arrow"]
    for name in (*kept, "poems/test-00000-of-00001.arrow", "dev/x.arrow", "Test/x.arrow",
                 "poems/x-test.arrow", "poems/x-validation-00000-of-00002.arrow"):  # fmt: skip
        write_arrow(tmp_path / name, {"text": ["a"]})
    assert warned(tmp_path) == kept


@pytest.mark.parametrize("name", ["test/chunk1/x.jsonl.gz", "train/validation.jsonl.gz"])
def test_formats_without_splits_say_that_held_out_files_are_read(tmp_path, name):
    for path in ("train/chunk1/x.jsonl.gz", name):
        write_dolma(tmp_path / path, ["a"])
    with pytest.warns(UserWarning, match=f"1 files look held out for tests, such as {name}"):
        assert len(find_sources(tmp_path, "dolma")) == 2


def test_fineweb_leaves_its_test_split_out(tmp_path):
    for name in ("data/deu_Latn/train/0.parquet", "data/deu_Latn/test/0.parquet",
                 "data/validation-00000-of-00001.parquet", "data/testament/0.parquet"):  # fmt: skip
        write_fineweb(tmp_path / name, ["a"])
    kept = ["data/deu_Latn/train/0.parquet", "data/testament/0.parquet"]
    assert warned(tmp_path, "fineweb") == kept
    assert names(tmp_path / "data/deu_Latn/test", "fineweb") == ["0.parquet"]
    write_fineweb(tmp_path / "only" / "test" / "0.parquet", ["a"])
    with pytest.raises(InputNotFoundError, match="no split for training"):
        names(tmp_path / "only", "fineweb")


def test_what_datasets_itself_leaves_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    rows = {"id": list(range(40)), "text": [f"text {n}" for n in range(40)]}
    whole = datasets.Dataset.from_dict(rows)
    whole.save_to_disk(str(tmp_path / "one"), num_shards=3)
    splits = datasets.DatasetDict(train=whole, test=whole.select(range(5)))
    splits.save_to_disk(str(tmp_path / "splits"), num_shards={"train": 2, "test": 1})
    lines = "".join(json.dumps({"text": text}) + "\n" for text in rows["text"])
    (tmp_path / "x.jsonl").write_text(lines)
    source = {"train": [str(tmp_path / "x.jsonl")], "test": [str(tmp_path / "x.jsonl")]}
    loaded = datasets.load_dataset("json", data_files=source, cache_dir=str(tmp_path / "cache"))
    loaded["train"].map(lambda row: {"text": "mapped"})
    for folder, read in (("one", names), ("splits", warned), ("cache", warned)):
        files = read(tmp_path / folder)
        found = [text for name in files for text in texts(tmp_path / folder / name, format="arrow")]
        assert found == rows["text"], folder
