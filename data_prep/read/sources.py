"""Find the files of RedPajama in each of its releases, and name the format and domain of each."""

import re
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from apex_composer.data_prep.errors import InputNotFoundError, Rejected, SettingsError, SourceError
from apex_composer.data_prep.read import remote
from apex_composer.data_prep.read.domains import (
    DOMAIN_PATTERN,
    LLAMA1,
    normalise_domain,
    slimpajama_domain,
)
from apex_composer.data_prep.read.lines import open_lines, read_lines

# How the files of each format are laid out, for error messages.
FORMATS = {
    "redpajama-v1": "<domain>/**.jsonl[.zst|.gz] with the folders common_crawl, c4, github, arxiv, "
    "wikipedia, stackexchange, book",
    "redpajama-sample": "**.parquet or <domain>_sample.jsonl",
    "redpajama-v2": "documents/**.json.gz",
    "slimpajama": "**.jsonl.zst with meta.redpajama_set_name",
    "jsonl": "<domain>/**.jsonl[.gz|.zst]",
}
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
# jsonl that no reader opens must not be left out in silence.
UNREADABLE = re.compile(
    r"\.(jsonl?\.(xz|bz2|lz4|br|zip|zstd|gzip|lzma|7z|tar)|json\.zst|ndjson(\.\w+)?)$"
)
SAMPLE_NAME = re.compile(r"([a-z0-9]+)(_[0-9]{4}-[0-9]{2})?_sample\.jsonl(\.gz|\.zst)?")
SNIFFED_LINES = 20
SNIFFED_BYTES = 10_000_000


@dataclass(frozen=True)
class Source:
    """One input file.

    Args:
        path: where it is; an address such as `s3://...` when it is remote.
        domain: domain of all its documents, None when every record names its own.
        format: name of one of FORMATS.
        bytes: size as stored; 0 for a remote file, whose store does not tell.
        splittable: whether byte ranges of it can be read alone.
    """

    path: str
    domain: str | None
    format: str
    bytes: int
    splittable: bool


def find_sources(input: str | Path, format: str = "auto") -> list[Source]:
    """Find all input files, sorted by their path below the input folder.

    Args:
        input: folder, or the address of a remote one that streaming can list.
        format: name of one of FORMATS, or `auto` to tell it from the files. Default: auto.

    Raises:
        InputNotFoundError: there is no such folder, or no file of the format in it.
        SettingsError: the format is unknown or not clear.
        ValueError: a file or folder does not fit the format.
    """
    if format not in ("auto", *FORMATS):
        raise SettingsError(f"format={format!r} must be one of auto, {', '.join(FORMATS)}.")
    if remote.is_remote(input):
        root, names = str(input).rstrip("/"), remote.list_files(str(input))
    else:
        root, names = str(Path(input)), list_folder(Path(input))
    names = [name for name in names if not name.startswith(".") and "/." not in name]
    check_compression(root, names)
    if format == "auto":
        format = _detect_format(root, names)
    chosen = [name for name in names if _belongs(name, format)]
    if not chosen:
        raise InputNotFoundError(
            f"{root!r} holds no file of the format {format}, which is {FORMATS[format]}."
        )
    return [_make_source(root, name, format) for name in chosen]


def list_folder(folder: Path) -> list[str]:
    """Names of all files below a folder, sorted.

    Raises:
        InputNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputNotFoundError(
            f"input={str(folder)!r} is not a folder. Give the folder that holds the domains' "
            "folders, or RedPajama as it was downloaded."
        )
    # Links to folders are followed (downloads are often spread over disks), each folder once.
    names, seen, waiting = [], {folder.resolve()}, [folder]
    while waiting:
        for path in sorted(waiting.pop(0).iterdir()):
            if path.is_dir():
                if path.resolve() not in seen:
                    seen.add(path.resolve())
                    waiting.append(path)
            else:
                names.append(path.relative_to(folder).as_posix())
    return sorted(names)


def check_compression(root: str, names: list[str]) -> None:
    """Refuse jsonl that no reader opens.

    Raises:
        ValueError: a file is named or compressed in such a way; the message names it.
    """
    unreadable = [name for name in names if UNREADABLE.search(name)]
    if unreadable:
        raise ValueError(
            f"{root}/{unreadable[0]} is named or compressed in a way that is not read; .jsonl, "
            ".jsonl.gz and .jsonl.zst are. Rename it or compress it again, or move it out of the "
            "folder."
        )


def _belongs(name: str, format: str) -> bool:
    if format == "redpajama-sample":
        return name.endswith(".parquet") or bool(SAMPLE_NAME.fullmatch(PurePosixPath(name).name))
    if format == "redpajama-v2":
        return name.endswith(".json.gz") and not name.endswith(".signals.json.gz")
    return name.endswith(JSONL)


def _detect_format(root: str, names: list[str]) -> str:
    v2 = [name for name in names if _belongs(name, "redpajama-v2")]
    sample = [name for name in names if _belongs(name, "redpajama-sample")]
    if v2:  # its duplicates and signatures are parquet too
        sample = [name for name in sample if not re.search(r"(^|/)(duplicates|minhash)/", name)]
    jsonl = [name for name in names if name.endswith(JSONL) and name not in sample]
    found = {"redpajama-v2": v2, "redpajama-sample": sample}
    if jsonl:
        found |= _detect_jsonl(root, jsonl)
    found = {format: files for format, files in found.items() if files}
    if len(found) > 1:
        shown = "; ".join(f"{format}: {files[0]}" for format, files in found.items())
        raise SettingsError(
            f"{root!r} holds files of several formats ({shown}). Give format= (on the command "
            "line --format) to read one of them, or a folder that holds only one."
        )
    if not found:
        raise InputNotFoundError(
            f"{root!r} holds no file of any known format: "
            + "; ".join(f"{format} is {layout}" for format, layout in FORMATS.items())
        )
    return next(iter(found))


def _detect_jsonl(root: str, names: list[str]) -> dict[str, list[str]]:
    first = {}
    for name in names:
        first.setdefault(name.split("/")[0], name)
    slim, other = [], []
    for name in first.values():
        (slim if _names_its_domain(root, name) else other).append(name)
    known = all(normalise_domain(name.split("/")[0]) in LLAMA1 for name in other)
    return {"slimpajama": slim, "redpajama-v1" if known else "jsonl": other}


def _names_its_domain(root: str, name: str) -> bool:
    """Whether the first good record of a file has SlimPajama's field."""
    with remote.local_copy(f"{root}/{name}") as path:
        try:
            with open_lines(path) as stream:
                for line in islice(read_lines(stream, 0, SNIFFED_BYTES), SNIFFED_LINES):
                    with suppress(Rejected):
                        return slimpajama_domain(line.parse().get("meta")) is not None
        except (EOFError, OSError, ValueError) as error:
            raise SourceError(f"{root}/{name} cannot be read at its first line: {error}") from error
    return False


def _make_source(root: str, name: str, format: str) -> Source:
    path = f"{root}/{name}"
    is_local = not remote.is_remote(root)
    return Source(
        path=path,
        domain=_find_domain(path, name, format),
        format=format,
        bytes=_size(path) if is_local else 0,
        splittable=is_local and name.endswith(".jsonl"),
    )


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}.") from error


def _find_domain(path: str, name: str, format: str) -> str | None:
    if format == "slimpajama" or name.endswith(".parquet"):
        return None
    if format == "redpajama-v2":
        return "cc"  # all of it comes from Common Crawl
    if format == "redpajama-sample":
        folder = SAMPLE_NAME.fullmatch(PurePosixPath(name).name).group(1)
    elif "/" not in name:
        raise ValueError(
            f"{path} lies outside a domain folder. Move it to <input>/<domain>/{name}."
        )
    else:
        folder = name.split("/")[0]
    domain = normalise_domain(folder)
    _check_domain(domain, folder, path, format)
    return domain


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
