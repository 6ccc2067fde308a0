import json

import pytest
from corpus import sentences, write_jsonl

from apex_composer.compare import instructions
from apex_composer.compare.instructions import (
    ASK_CONTINUATION,
    ASK_MEANING,
    HELD_OUT,
    TRAIN,
    divided_examples,
    docstring_examples,
    make_instructions,
    section_examples,
)
from apex_composer.demo.embedded import SMALLEST_DOCUMENT
from apex_composer.demo.tokenizer import save_tokenizer, train_tokenizer

MODULE = '''
def add(a, b):
    """Add two
    numbers.  They may be of any kind.

    More of it.
    """
    return a + b  # a remark


class Thing:
    async def turn(self):
        "Turn the thing around"
        self.turned = True

    def short(self):
        "No."
        return 1

    def only_documented(self):
        """Has nothing but this line."""

    def undocumented(self):
        return 2
'''


def test_a_function_asks_without_its_docstring_whose_first_sentence_answers():
    assert list(docstring_examples(MODULE)) == [
        (f"{ASK_MEANING}\n\ndef add(a, b):\n    return a + b", "Add two numbers."),
        (
            f"{ASK_MEANING}\n\nasync def turn(self):\n    self.turned = True",
            "Turn the thing around",
        ),
    ]
    assert list(docstring_examples("def broken(:")) == []


def test_a_section_is_continued_and_no_text_is_there_twice():
    text = sentences(1, words=600)
    pairs = list(section_examples(text))
    assert len(pairs) == len(text) // instructions.SECTION
    halves = [q.removeprefix(f"{ASK_CONTINUATION}\n\n") + " " + a for q, a in pairs]
    assert "".join("".join(halves).split()) == "".join(text.split())
    assert list(section_examples("short")) == [(f"{ASK_CONTINUATION}\n\nsh", "ort")]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A base model's data, and a library of which it has been trained on the first module."""
    long = MODULE + "#" * SMALLEST_DOCUMENT
    modules = [long.replace("a + b", f"a + b + {n}") for n in range(40)]
    named = [(f"m{number}", text) for number, text in enumerate(modules)]
    monkeypatch.setattr(instructions, "standard_library_sources", lambda: iter(named))
    prepared = tmp_path / "data"
    for split, texts in (("pretrain", modules[:1]), ("train", ["x"]), ("validation", ["y"])):
        write_jsonl(prepared / "text" / split / "github" / "x.jsonl", texts)
    save_tokenizer(train_tokenizer(modules, 400), prepared / "tokenizer")
    (prepared / "made_from.json").write_text("{}")
    return prepared


def test_modules_are_held_out_whole_and_the_base_models_own_left_out(library):
    divided = divided_examples(None, library / "text")
    questions = {split: {q for q, _ in examples} for split, examples in divided.items()}
    assert not questions[TRAIN] & questions[HELD_OUT]
    both = questions[TRAIN] | questions[HELD_OUT]
    assert not any(question.endswith("a + b + 0") for question in both)
    assert len([q for q in both if "a + b" in q]) == 39
    assert 2 <= len(questions[HELD_OUT]) <= 16


def test_given_text_is_divided_as_for_the_base_model(library, tmp_path):
    divided = divided_examples(tmp_path, library / "text")
    assert {split: [a for _, a in examples] for split, examples in divided.items()} == {
        TRAIN: [],
        HELD_OUT: [],  # one letter has no second half
    }
    texts = {"train": sentences(1, words=300), "validation": sentences(2, words=300)}
    for split, text in texts.items():
        write_jsonl(library / "text" / split / "github" / "x.jsonl", [text])
    divided = divided_examples(tmp_path, library / "text")
    for split, own in ((TRAIN, "train"), (HELD_OUT, "validation")):
        assert divided[split] and all(answer in texts[own] for _, answer in divided[split])


def test_what_is_written_is_what_the_loader_reads_and_is_made_once(library, tmp_path):
    first = make_instructions(None, library, tmp_path / "out", 256)
    files = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.jsonl")}
    assert first["kind"] == "docstrings"
    assert first["train"]["response_tokens"] < first["train"]["tokens"]
    lines = (tmp_path / "out" / "train" / "train.jsonl").read_text().splitlines()
    assert len(lines) == first["train"]["examples"]
    roles = [message["role"] for message in json.loads(lines[0])["messages"]]
    assert roles == ["user", "assistant"]
    assert make_instructions(None, library, tmp_path / "out", 256) == first
    (library / "made_from.json").write_text('{"other": 1}')
    assert make_instructions(None, library, tmp_path / "out", 256) == first
    assert {p: p.read_bytes() for p in files} == files
