import json

import pytest
from chats import instruct, tulu_line, write_records

from apex_composer.data_prep import verify_instruct
from apex_composer.data_prep.errors import SettingsError
from apex_composer.data_prep.instruct import tokenise
from apex_composer.data_prep.write.manifest import hash_content


@pytest.fixture
def out(tmp_path):
    write_records(tmp_path / "in.jsonl", [tulu_line(number) for number in range(30)])
    instruct(tmp_path / "in.jsonl", tmp_path / "out")
    return tmp_path / "out"


def check(out):
    return verify_instruct(out, workers=1)


def test_what_was_written_is_well(out):
    assert check(out) == []


def test_any_change_of_a_file_is_found(out):
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.name == "manifest.json":
            path.write_bytes(content.replace(b"flan_v2", b"flan_v1"))
        else:
            path.write_bytes(content + b" ")
        (fault,) = check(out)
        assert fault.startswith(path.relative_to(out).as_posix())
        path.write_bytes(content)
    for name in ("more.jsonl", "streams.yaml"):
        (out / name).write_text("{}")
    assert check(out) == [f"{name}: not in the manifest" for name in ("more.jsonl", "streams.yaml")]
    (out / "train.jsonl").unlink()
    assert "train.jsonl: cannot be read (No such file or directory)" in check(out)


def test_numbers_that_do_not_come_out_again_are_found(out):
    path = out / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["lima"]["response_tokens"] += 1
    manifest["lengths"]["validation"] = {"64": 1}
    path.write_text(json.dumps(manifest | {"sha256": hash_content(manifest)}))
    lengths, splits = check(out)
    assert lengths.startswith("manifest.json: lengths were") and "splits were" in splits


def test_another_versions_tokens_are_found(out, monkeypatch):
    sliced = tokenise.slice_turns

    def with_blanks(messages, tokenizer):
        return ((prompt, f" {response}") for prompt, response in sliced(messages, tokenizer))

    monkeypatch.setattr(tokenise, "slice_turns", with_blanks)
    assert any("splits were" in fault for fault in check(out))


@pytest.mark.parametrize("content", ["[]", '{"format": "apex-composer instruct 9"}', None])
def test_what_is_no_instruction_data_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(SettingsError, match="no finished instruction data"):
        check(tmp_path)
