import hashlib
import json

import pytest

from apex_composer.evaluate.local_files import LocalFile, describe_problems, sha256_of, unique

QUESTIONS = LocalFile("google-research-datasets/nq_open", None, "train", documents=3)
DOCUMENT = json.dumps({"question": "w1", "answer": ["w2"]}) + "\n"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "missing"),
        ("", "it has 0 documents, and 3 are needed"),
        ("question, answer\n", "line 1 is no JSON object"),
        ("3\n", "line 1 is no JSON object"),
        (DOCUMENT * 3 + DOCUMENT[:20], "line 4 is no JSON object"),  # a copy that was broken off
        ('{"question": "w1"}\n', "the document in line 1 lacks answer"),
        (DOCUMENT * 3 + '\n{"question": "w1"}\n', "the document in line 5 lacks answer"),
        (
            DOCUMENT * 3 + '{"question": null, "answer": []}',
            "the document in line 4 lacks question",
        ),
        (DOCUMENT * 2 + "\n", "it has 2 documents, and 3 are needed"),
        (DOCUMENT * 3, None),
    ],
)
def test_what_is_wrong_with_a_file_is_told(tmp_path, content, problem):
    path = tmp_path / "google-research-datasets/nq_open/default/train.jsonl"
    assert QUESTIONS.below(tmp_path) == path
    if content is not None:
        path.parent.mkdir(parents=True)
        path.write_text(content)
    assert QUESTIONS.problem(tmp_path) == problem
    lines = describe_problems([QUESTIONS], tmp_path)
    assert lines == (
        [f"{path}: {problem}. Write it from split train of google-research-datasets/nq_open"]
        if problem
        else []
    )


def test_a_file_that_several_tasks_read_is_named_once_with_the_most_documents():
    few, other = LocalFile("a/b", None, "train", 1), LocalFile("a/b", "c", "train", 1)
    many = LocalFile("a/b", None, "train", 33)
    assert unique([few, other, many, few]) == [many, other]


def test_hash_is_that_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 10**6)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"abc" * 10**6).hexdigest()
