"""The layouts that are read: which files belong to each, and the domain that a place names."""

import re
from pathlib import Path, PurePosixPath

from apex_composer.data_prep.read.domains import DOMAIN_PATTERN, LLAMA1, normalise_domain

# How the files of each format are laid out, for error messages.
FORMATS = {
    "redpajama-v1": "<domain>/**.jsonl[.zst|.gz] with the folders common_crawl, c4, github, arxiv, "
    "wikipedia, stackexchange, book",
    "redpajama-sample": "**.parquet or <domain>_sample.jsonl",
    "redpajama-v2": "documents/**.json.gz",
    "slimpajama": "**.jsonl.zst with meta.redpajama_set_name",
    "jsonl": "<domain>/**.jsonl[.gz|.zst]",
    "fineweb": "**.parquet with a column text, such as data/CC-MAIN-2013-20/000_00000.parquet",
    "dolma": "**.json.gz or **.jsonl[.gz|.zst] with text and source in each record",
    "arrow": "**.arrow as datasets' save_to_disk or its cache leave them, with a column text",
}
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
JSON_ARCHIVE = ".json.gz"
SAMPLE_NAME = re.compile(r"([a-z0-9]+)(_[0-9]{4}-[0-9]{2})?_sample\.jsonl(\.gz|\.zst)?")
ATTRIBUTES = re.compile(r"(^|/)attributes/")  # Dolma's tools write what they found there, no text
# Folders that name no domain: those of the hub, of splits, of versions and hashes in datasets'
# cache, of samples by size, and of crawls, a hundred of which would get equal shares.
NAMELESS = re.compile(
    r"data|sample|snapshots|train|test|validation|valid|val|dev|default(-[0-9a-f]{16})?"
    r"|\d+\.\d+\.\d+|[0-9a-f]{16,}|\d+BT|CC-MAIN-\d{4}-\d+"
)


def belongs(name: str, format: str) -> bool:
    """Whether a file of this path below the input is of a format."""
    if format == "redpajama-sample":
        return name.endswith(".parquet") or bool(SAMPLE_NAME.fullmatch(PurePosixPath(name).name))
    if format == "redpajama-v2":
        return name.endswith(JSON_ARCHIVE) and not name.endswith(".signals.json.gz")
    if format == "fineweb":
        return name.endswith(".parquet")
    if format == "arrow":
        return name.endswith(".arrow")
    if format == "dolma":
        return name.endswith((*JSONL, JSON_ARCHIVE)) and not ATTRIBUTES.search(name)
    return name.endswith(JSONL)


def find_domain(root: str, name: str, format: str) -> str | None:
    """Name the domain of a file, None where every record names its own.

    `jsonl` and `redpajama-v1` take the first folder below the input, `fineweb` and `arrow` the
    first that is not `data`, `sample`, a sample's size, a crawl, `train`, another split, a version
    or a hash: a language, a data set. Where none is left, the domain of `fineweb` is `fineweb`,
    and that of `arrow` the last such folder of the input's own path.

    Args:
        root: the input.
        name: path of the file below it.

    Raises:
        ValueError: the place does not fit the format, or its name is unusable.
    """
    path = f"{root}/{name}"
    if format in ("fineweb", "arrow"):
        folder = _naming_folder(root, name, format)
    elif format in ("slimpajama", "dolma") or name.endswith(".parquet"):
        return None
    elif format == "redpajama-v2":
        return "cc"  # all of it comes from Common Crawl
    elif format == "redpajama-sample":
        folder = SAMPLE_NAME.fullmatch(PurePosixPath(name).name).group(1)
    elif "/" not in name:
        raise ValueError(
            f"{path} lies outside a domain folder. Move it to <input>/<domain>/{name}."
        )
    else:
        folder = name.split("/")[0]
    # Only RedPajama's names are many for one thing: elsewhere wiki and wikipedia are two.
    domain = folder if format in ("fineweb", "arrow") else normalise_domain(folder)
    _check_domain(domain, folder, path, format)
    return domain


def _naming_folder(root: str, name: str, format: str) -> str:
    below = [part for part in PurePosixPath(name).parent.parts if not NAMELESS.fullmatch(part)]
    if below:
        return below[0]
    if format == "fineweb":
        return format
    whole = root if "://" in root else Path(root).absolute().as_posix()
    named = [part for part in whole.split("/") if part and not NAMELESS.fullmatch(part)]
    return named[-1] if named else format


def _check_domain(domain: str, folder: str, path: str, format: str) -> None:
    if format in ("redpajama-v1", "redpajama-sample") and domain not in LLAMA1:
        raise ValueError(
            f"{path}: {folder!r} is no domain of RedPajama ({', '.join(LLAMA1)}). Rename it, or "
            "give format='jsonl', which takes any folder names."
        )
    if not DOMAIN_PATTERN.fullmatch(domain):
        raise ValueError(
            f"{path}: the domain folder {folder!r} has an unusable name: letters, digits, '_' and "
            "'-' are allowed, because the name becomes a metric label. Rename the folder."
        )
