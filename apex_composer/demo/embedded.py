"""A corpus of real text that every machine with Python has, in RedPajama's format.

Documentation comes from installed packages, not from the standard library's docstrings: those are
part of the sources in the domain `github` and would leak from its training documents into another
domain's validation documents.
"""

import ast
import hashlib
import json
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from apex_composer.data_prep.atomic_files import new_file, new_folder
from apex_composer.data_prep.progress import progress_bar

SOURCES_SKIPPED = {
    "test", "tests", "testing", "idlelib", "idle_test", "turtledemo", "ensurepip", "lib2to3",
    "pydoc_data", "site-packages", "dist-packages", "__pycache__", "_vendor", "vendor",
}  # fmt: skip
LICENCE_NAME = re.compile(r"licen[cs]e|copying|notice", re.IGNORECASE)
SMALLEST_DOCUMENT = 500
LARGEST_DOCUMENT = 200_000
# Not text of the corpus, which would be another one after every change of this project.
OWN = "apex_composer"
# A module's docstrings are a document when they are prose, not one-line remarks.
SMALLEST_DOCSTRING = 200

Document = tuple[str, str]


def write_embedded_corpus(out: Path | str, *, domain_limit: int = 8_000_000) -> Path:
    """Write `<out>/<domain>/<domain>.jsonl.zst` for three domains of installed text.

    `github`: standard-library sources; `documentation`: the language reference that pydoc carries
    and the docstrings of installed packages; `packages`: their long descriptions and licence
    texts. The same packages beside this one give the same corpus.

    Args:
        out: folder to create.
        domain_limit: bytes of text in a domain at most. Default: 8,000,000.

    Returns:
        The folder.

    Raises:
        FileExistsError: `out` exists.
        RuntimeError: this Python has no standard-library sources.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"out={str(out)!r} exists. Give a folder that does not exist.")
    collectors: dict[str, Callable[[], Iterator[Document]]] = {
        "documentation": documentation,
        "github": standard_library_sources,
        "packages": package_texts,
    }
    with new_folder(out) as partial:
        for domain, collect in collectors.items():
            with progress_bar(
                total=domain_limit, unit="B", unit_scale=True, desc=f"collecting {domain}"
            ) as bar:
                documents = choose_documents(collect(), domain_limit, bar)
            records = ({"text": text, "meta": {"source": name}} for name, text in documents)
            write_documents(partial / domain / f"{domain}.jsonl.zst", records)
    return out


def choose_documents(
    documents: Iterable[Document], limit: int, progress: tqdm | None = None
) -> list[Document]:
    """Take documents of a usual size, each text once, until a limit is reached.

    Args:
        documents: pairs of a source's name and its text.
        limit: bytes of UTF-8 text.
        progress: bar that counts bytes of text. Default: None.
    """
    chosen, seen, total = [], set(), 0
    for name, text in documents:
        key = _duplicate_key(text)
        size = len(text.encode("utf-8", errors="replace"))
        if key in seen or not SMALLEST_DOCUMENT <= size <= LARGEST_DOCUMENT:
            continue
        if total + size > limit:
            break
        seen.add(key)
        chosen.append((name, text))
        total += size
        if progress is not None:
            progress.update(size)
    return chosen


def standard_library_sources() -> Iterator[Document]:
    """Yield the modules of the standard library.

    Raises:
        RuntimeError: there are none beside this Python.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = _python_files(root)
    if not paths:
        raise RuntimeError(
            f"No standard-library sources in {root}. Use a full Python installation, or give your "
            "own text (make train DATA=<folder>)."
        )
    for path in paths:
        yield f"stdlib/{path.relative_to(root).as_posix()}", _read_text(path)


def documentation() -> Iterator[Document]:
    """Yield the language reference's topics, then the docstrings of installed packages."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield f"pydoc/{name}", text
    root = Path(sysconfig.get_path("purelib"))
    for path in _python_files(root):
        text = module_docstrings(_read_text(path))
        yield f"docstrings/{path.relative_to(root).as_posix()}", text


def module_docstrings(source: str) -> str:
    """Join the long docstrings of a module, each under the name of what it documents.

    Args:
        source: Python source text; one that this Python cannot parse has no docstrings.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's escape sequences
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    parts = []
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, documented) else None
        if text and len(text) >= SMALLEST_DOCSTRING:
            parts.append(f"{getattr(node, 'name', 'module')}\n\n{text}")
    return "\n\n".join(parts)


def package_texts() -> Iterator[Document]:
    """Yield the long description (usually the README) and the licences of installed packages."""
    for distribution in _distributions():
        yield f"readme/{distribution.name}", distribution.metadata.get("Description", "")
        for file in sorted(distribution.files or [], key=str):
            if ".dist-info" in str(file) and LICENCE_NAME.search(file.name):
                text = _read_text(Path(str(distribution.locate_file(file))))
                yield f"license/{distribution.name}/{file.name}", text


def _distributions() -> list[metadata.Distribution]:
    """List other installed packages by name, each once, with broken installations left out."""
    named = [(d.metadata.get("Name"), d) for d in metadata.distributions()]
    found = {name.lower(): distribution for name, distribution in named if name}
    return [found[name] for name in sorted(found) if name.replace("-", "_") != OWN]


def _python_files(root: Path) -> list[Path]:
    """List source files in the order of a hash of their names.

    A limit then cuts a sample of the whole tree, not its first packages of the alphabet.
    """
    paths = [
        path
        for path in root.rglob("*.py")
        if not SOURCES_SKIPPED & set(path.relative_to(root).parts[:-1])
        and OWN not in path.relative_to(root).parts[0]  # nor what an editable installation makes
        and path.is_file()
        and SMALLEST_DOCUMENT <= path.stat().st_size <= 4 * LARGEST_DOCUMENT
    ]
    return sorted(
        paths, key=lambda p: hashlib.blake2b(p.relative_to(root).as_posix().encode()).digest()
    )


def _read_text(path: Path) -> str:
    """Read UTF-8 text; nothing where a file is missing or in another encoding."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _duplicate_key(text: str) -> str:
    """Reduce a text to what two copies of a licence by different authors have in common."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line and "copyright" not in line.lower())


def write_documents(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write records of RedPajama's form as an archive of jsonl.

    Args:
        path: file to write, `.jsonl.zst`; its folder is created when missing.
        records: each with its `text`.
    """
    import pyarrow

    with new_file(path) as file, pyarrow.CompressedOutputStream(file, "zstd") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
