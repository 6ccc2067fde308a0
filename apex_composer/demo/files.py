"""Write result files so that a half-written one never looks whole."""

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it.

    Args:
        path: file to write; its folder is created when missing.
        text: content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON that people can read.

    Args:
        path: file to write; its folder is created when missing.
        content: dicts, lists, strings and numbers.
    """
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
    """
    return json.loads(path.read_text(encoding="utf-8"))
