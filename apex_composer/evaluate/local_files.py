"""Copies of the tasks' data sets on disk: which files, in which form, whether they are there."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FIELDS = Path(__file__).with_name("presets") / "fields.yaml"


@dataclass(frozen=True)
class LocalFile:
    """A split of a data set of the hub as jsonl, one document a line, as `Dataset.to_json` has it.

    Attributes:
        dataset: name on the hub.
        config: of the data set; None: its only one.
        split: of the data set.
        documents: it has these at least.
    """

    dataset: str
    config: str | None
    split: str
    documents: int = 1

    def below(self, folder: Path) -> Path:
        """Its path: `<folder>/<dataset>/<config or default>/<split>.jsonl`."""
        return folder / self.dataset / (self.config or "default") / f"{self.split}.jsonl"

    @property
    def fields(self) -> dict[str, str]:
        """What a document has, by field; empty where the package does not know the data set."""
        return _all_fields().get(self.dataset, {})

    def problem(self, folder: Path) -> str | None:
        """What is wrong with it in a folder, if anything: every document is looked at."""
        path = self.below(folder)
        if not path.is_file():
            return "missing"
        count = 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                count += 1
                try:
                    document = dict(json.loads(line))
                except (ValueError, TypeError):
                    return f"line {number} is no JSON object"
                # One without a field would be evaluated all the same, with None in its place.
                if lacking := [name for name in self.fields if document.get(name) is None]:
                    return f"the document in line {number} lacks {', '.join(lacking)}"
        if count < self.documents:
            return f"it has {count} documents, and {self.documents} are needed"
        return None


@cache
def _all_fields() -> dict[str, dict[str, str]]:
    import yaml

    return yaml.safe_load(FIELDS.read_text(encoding="utf-8"))


def unique(files: Iterable[LocalFile]) -> list[LocalFile]:
    """Each file once, with the most documents that any task needs of it, in order."""
    found: dict[tuple[str, str | None, str], LocalFile] = {}
    for file in files:
        place = (file.dataset, file.config, file.split)
        if place not in found or found[place].documents < file.documents:
            found[place] = file
    return list(found.values())


def describe_problems(files: Iterable[LocalFile], folder: Path) -> list[str]:
    """One line for every file that cannot be used, with what to do."""
    return [
        f"{file.below(folder)}: {problem}. Write it from split {file.split} of {file.dataset}"
        f"{f' ({file.config})' if file.config else ''}"
        for file in files
        if (problem := file.problem(folder))
    ]


def sha256_of(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
