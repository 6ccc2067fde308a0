"""Reading one file of text, which the tests of reading share."""

from apex_composer.data_prep.read.documents import read_documents
from apex_composer.data_prep.read.sources import Source


def source_of(path, domain="book", format="jsonl"):
    """A file as `find_sources` would describe it."""
    plain = path.suffix == ".jsonl"
    return Source(str(path), domain, format, path.stat().st_size, splittable=plain)


def read(path, start=0, stop=None, domain="book", format="jsonl", **options):
    """Documents and rejects of one file."""
    rejects = []
    documents = read_documents(
        source_of(path, domain, format),
        start,
        stop,
        lambda place, reason, excerpt, domain: rejects.append((place, reason, excerpt)),
        **options,
    )
    return list(documents), rejects


def texts(path, **options):
    """Texts of one file."""
    return [document.text for document in read(path, **options)[0]]


def reasons(path, **options):
    """Why lines of one file are rejected."""
    return [reason for _, reason, _ in read(path, **options)[1]]
