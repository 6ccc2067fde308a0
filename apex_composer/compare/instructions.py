"""Instructions made of text that is on the machine, in two forms.

Without a folder of text: a function of Python's own library without its docstring asks, the
docstring's first sentence answers; a module is held out whole, by its text's hash, and what the
base model was trained on is left out. With one: the first half of a section asks, the second
answers, and what is held out are the documents that the base model's validation had.
"""

import ast
import platform
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from apex_composer.data_prep.atomic_files import read_json, write_json
from apex_composer.data_prep.instruct.manifest import all_sources
from apex_composer.data_prep.instruct.options import SPLIT_FILES, InstructOptions
from apex_composer.data_prep.instruct.preparation import prepare_instruct
from apex_composer.data_prep.read.documents import read_documents
from apex_composer.data_prep.read.sources import find_sources
from apex_composer.data_prep.tokens.document_hash import HASHES, hash_text
from apex_composer.demo.documents import PRETRAIN, VALIDATION, cut
from apex_composer.demo.documents import TRAIN as CONTINUED
from apex_composer.demo.embedded import choose_documents, standard_library_sources, write_documents
from apex_composer.demo.from_scratch import MADE_FROM, TEXT, TOKENIZER

TRAIN, HELD_OUT = "train", "held_out"
HELD_OUT_SHARE = 0.2  # of the modules
ASK_MEANING = "Say in one sentence what this function does."
ASK_CONTINUATION = "Continue this text."
# Characters of a section, question and answer together: some 200 tokens of the demo's tokenizer.
SECTION = 500
# Nothing shorter says what a function does.
SMALLEST_ANSWER = 3  # words
SENTENCE_END = re.compile(r"\n\s*\n|(?<=[.!?])\s")

# An example: question and answer.
Example = tuple[str, str]


def make_instructions(data: Path | None, prepared: Path, out: Path, length: int) -> dict[str, Any]:
    """Write `<out>/train/` and `<out>/held_out/`, each what `apex-composer prep-instruct` makes.

    Args:
        data: folder of text that the base model learned from, None for the embedded corpus.
        prepared: the base model's data, with `text/` and `tokenizer/`.
        out: folder to write.
        length: tokens of an example at most; longer ones are left out.

    Returns:
        What the examples are, and per split their number, tokens, response_tokens and sha256.

    Raises:
        ValueError: a split has no example.
    """
    made, counts = out / MADE_FROM, {}
    origin = {"base": read_json(prepared / MADE_FROM), "python": platform.python_version()}
    if read_json(made) != origin:
        shutil.rmtree(out, ignore_errors=True)
        for split, examples in divided_examples(data, prepared / TEXT).items():
            # By length: batches of the evaluation, which is in this order, are padded less.
            ordered = sorted(examples, key=lambda example: sum(map(len, example)))
            records = (as_chat(question, answer) for question, answer in ordered)
            write_documents(out / "chats" / f"{split}.jsonl.zst", records)
        write_json(made, origin)
    for split in (TRAIN, HELD_OUT):
        manifest = prepare_instruct(
            out / "chats" / f"{split}.jsonl.zst",
            out / split,
            tokenizer=prepared / TOKENIZER,
            # Examples that are too long are many, and expected.
            options=InstructOptions(length, validation_share=0, max_reject_rate=0.999),
            workers=1,
        )
        numbers = all_sources(manifest["splits"])["train"]
        counts[split] = {n: numbers[n] for n in ("examples", "tokens", "response_tokens")}
        counts[split]["sha256"] = manifest["files"][SPLIT_FILES["train"]]["sha256"]
    return {"kind": "docstrings" if data is None else "sections", **counts}


def divided_examples(data: Path | None, text: Path) -> dict[str, list[Example]]:
    """The examples of every split, each question once in all, those that are held out first.

    Args:
        data: folder of text, None for Python's own library.
        text: folder of the base model's text, `<split>/<domain>/`.
    """
    documents = modules(text) if data is None else sections_of(text)
    examples_of = docstring_examples if data is None else section_examples
    return {split: examples for split, examples in _each_once(documents, examples_of)}


def _each_once(
    documents: dict[str, list[str]], examples_of: Callable[[str], Iterable[Example]]
) -> Iterator[tuple[str, list[Example]]]:
    seen: set[str] = set()
    for split in (HELD_OUT, TRAIN):
        found = dict(example for text in documents[split] for example in examples_of(text))
        yield split, [(q, a) for q, a in found.items() if q not in seen]
        seen.update(found)


def modules(text: Path) -> dict[str, list[str]]:
    """The library's modules that the base model has not been trained on, by split."""
    trained = set(read_texts(text / PRETRAIN))
    found: dict[str, list[str]] = {TRAIN: [], HELD_OUT: []}
    for _, module in choose_documents(standard_library_sources(), limit=1 << 40):
        if module not in trained:
            held_out = hash_text(module) < HELD_OUT_SHARE * HASHES
            found[HELD_OUT if held_out else TRAIN].append(module)
    return found


def sections_of(text: Path) -> dict[str, list[str]]:
    """The base model's documents that it has not been trained on; all where there are no such."""
    continued = text / CONTINUED
    return {
        HELD_OUT: read_texts(text / VALIDATION),
        TRAIN: read_texts(continued if continued.is_dir() else text / PRETRAIN),
    }


def read_texts(folder: Path) -> list[str]:
    """The texts of all documents of a folder that the demo has written."""
    return [
        document.text
        for source in find_sources(folder)
        for document in read_documents(source, 0, None, lambda *reject: None)
    ]


def docstring_examples(source: str) -> Iterator[Example]:
    """Yield every documented function of a module without its docstring, and what that says first.

    Args:
        source: Python source text; one that this Python cannot parse has no functions.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's escape sequences
            nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in nodes:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        answer = " ".join(SENTENCE_END.split(ast.get_docstring(node) or "", 1)[0].split())
        if len(answer.split()) >= SMALLEST_ANSWER:
            node.body = node.body[1:]
            yield f"{ASK_MEANING}\n\n{ast.unparse(node)}", answer


def section_examples(text: str) -> Iterator[Example]:
    """Yield every section of a text as its first half and, after a space or a line, its second."""
    for section in cut(text, max(1, len(text) // SECTION)):
        first, *second = cut(section, 2)
        if second:
            yield f"{ASK_CONTINUATION}\n\n{first.strip()}", second[0].strip()


def as_chat(question: str, answer: str) -> dict[str, Any]:
    """One record of the form that `apex-composer prep-instruct` reads."""
    roles = {"user": question, "assistant": answer}
    return {"messages": [{"role": role, "content": text} for role, text in roles.items()]}
