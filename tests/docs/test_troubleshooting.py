"""docs/troubleshooting.md quotes messages that can still be met."""

import ast
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
OWN, _, OTHERS = PAGE.partition("\n## Messages of Composer")
LIBRARIES = OTHERS.partition("\n## Messages of torch")[0]
# What the packages make of other texts, or the operating system says.
NOT_THEIRS = ("FileExistsError", "PermissionError")


def quoted(text: str) -> list[str]:
    """The messages of the tables' first column."""
    first = re.findall(r"^\| `(.+?)`(?: below .*?| in .*?)? \| ", text, re.MULTILINE)
    return [message for message in first if not message.startswith(NOT_THEIRS)]


def texts(source: str) -> Iterator[str]:
    """Yield the strings of a module as one line each, with a mark for every value in them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [getattr(part, "value", "") for part in node.values]
            yield " ".join("".join(p if isinstance(p, str) else "\0" for p in parts).split())
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield " ".join(node.value.split())


def pattern(message: str) -> re.Pattern[str]:
    """What a quoted message looks like in the source: between its pieces stand values."""
    pieces = [re.escape(piece.strip()) for piece in message.split("...")]
    return re.compile(r".*?".join(pieces))


SOURCES = [*(ROOT / "apex_composer").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")]
STRINGS = "\n".join(text for path in SOURCES for text in texts(path.read_text()))


def test_there_are_messages():
    assert len(quoted(OWN)) >= 30 and len(quoted(LIBRARIES)) >= 8


@pytest.mark.parametrize("message", quoted(OWN))
def test_a_message_of_ours_is_in_the_source(message):
    pieces = [piece for piece in message.split("...") if len(piece.strip()) >= 8]
    assert pieces, f"{message!r} says too little to be found"
    assert pattern(message).search(STRINGS), f"no text of this package reads {message!r}"


def test_messages_of_libraries_are_in_their_sources():
    packages = ("composer", "llmfoundry", "streaming")
    folders = [Path(find_spec(name).origin).parent for name in packages]
    hub = Path(find_spec("transformers").origin).parent / "utils" / "hub.py"
    wandb = Path(find_spec("wandb").origin).parent / "proto" / "wandb_internal_pb2.py"
    files = [hub, wandb, *(path for folder in folders for path in folder.rglob("*.py"))]
    source = "\n".join(path.read_text() for path in files)
    lost = [m for m in quoted(LIBRARIES) for p in m.split("...") if p.strip() not in source]
    assert lost == []


def test_a_message_that_is_gone_is_noticed():
    given = "f'a {b} that {c}: ' 'is kept'"
    assert pattern("a ... that ...: is kept").search("\n".join(texts(given)))
    assert not pattern("a ... that ...: is gone").search("\n".join(texts(given)))
