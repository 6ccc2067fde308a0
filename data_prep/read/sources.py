"""Find the files of an input, and name the format and domain of each."""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from apex_composer.data_prep.errors import InputNotFoundError, SettingsError, SourceError
from apex_composer.data_prep.read import remote
from apex_composer.data_prep.read.detect_format import detect_format
from apex_composer.data_prep.read.formats import FORMATS, JSON_ARCHIVE, JSONL, belongs, find_domain
from apex_composer.data_prep.read.training_files import training_files, warn_of_held_out

# jsonl that no reader opens must not be left out in silence.
UNREADABLE = re.compile(
    r"\.(jsonl?\.(xz|bz2|lz4|br|zip|zstd|gzip|lzma|7z|tar)|json\.zst|ndjson(\.\w+)?)$"
)
# Nor what a download or `datasets` has begun: the corpus would be shorter than it should be.
UNFINISHED = re.compile(
    r"\.(parquet|arrow|jsonl?(\.\w+)?)\.(crdownload|part|partial|incomplete|download|aria2|tmp)$"
    r"|\.incomplete/.*\.(parquet|arrow)$"
)
HUB_DOWNLOAD = re.compile(r"(^|/)\.cache/huggingface/download/.*\.incomplete$")
HUB_CACHE = re.compile(r"(.*/)?snapshots/[0-9a-f]{40}(?=/)")
# What Git leaves in place of a large file.
DATA = (*JSONL, JSON_ARCHIVE, ".parquet", ".arrow")
POINTER, POINTER_BYTES = b"version https://git-lfs", 1024


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
    _check_download(root, names)
    names = [name for name in names if not _is_hidden(name)]
    check_compression(root, names)
    if format == "auto":
        format = detect_format(root, names)
    chosen = [name for name in names if belongs(name, format)]
    if not chosen:
        raise InputNotFoundError(
            f"{root!r} holds no file of the format {format}, which is {FORMATS[format]}."
        )
    if format == "fineweb":
        _check_samples(root, chosen)
    if format in ("fineweb", "arrow"):
        chosen = training_files(root, names, format)
    else:
        warn_of_held_out(root, chosen)
    return [_make_source(root, name, format) for name in chosen]


def list_folder(folder: Path) -> list[str]:
    """Names of all files below a folder, sorted.

    Raises:
        InputNotFoundError: there is no such folder.
        SourceError: a link leads nowhere, and has no suffix, so that it may be that of a folder.
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
                continue
            name = path.relative_to(folder).as_posix()
            # A link to a folder, of a whole domain it may be.
            if not path.suffix and not path.exists() and not _is_hidden(name):
                raise SourceError(f"{path} is a link to nothing. Mount its disk, or remove it.")
            names.append(name)
    return sorted(names)


def _is_hidden(name: str) -> bool:
    return "/." in f"/{name}"


def check_compression(root: str, names: list[str]) -> None:
    """Refuse jsonl that no reader opens, and data whose suffix is written in capitals.

    Raises:
        ValueError: a file is named or compressed in such a way; the message names it.
    """
    unreadable = [
        name
        for name in names
        if UNREADABLE.search(name.lower())
        or (name.lower().endswith(DATA) and not name.endswith(DATA))
    ]
    if unreadable:
        raise ValueError(
            f"{root}/{unreadable[0]} is named or compressed in a way that is not read; .jsonl, "
            ".jsonl.gz and .jsonl.zst are, in small letters. Rename it or compress it again, or "
            "move it out of the folder."
        )


def _check_samples(root: str, names: list[str]) -> None:
    """Refuse FineWeb beside a sample of it, which has the same documents, and two such samples."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault("/".join(name.split("/")[:2]) if name.startswith("sample/") else "", name)
    if len(first) > 1:
        raise SettingsError(
            f"{root!r} holds FineWeb and samples of it, or several: {', '.join(first.values())}. "
            "Their documents are the same ones and would be read twice. Give the folder of one."
        )


def _check_download(root: str, names: list[str]) -> None:
    for name in names:
        if _is_hidden(name) and not HUB_DOWNLOAD.search(name):
            continue
        if name.endswith(DATA) and not remote.is_remote(root) and _is_pointer(Path(root, name)):
            raise ValueError(f"{root}/{name} is Git's pointer to a file. Fetch it: git lfs pull.")
        if UNFINISHED.search(name) or HUB_DOWNLOAD.search(name):
            raise ValueError(
                f"{root}/{name} is the beginning of a file that was never finished. Fetch or make "
                "it again, or move it out of the folder."
            )
        if revision := HUB_CACHE.match(name):
            raise SettingsError(
                f"{root!r} is the hub's cache, which may hold several revisions of a data set. "
                f"Give the folder of one: {root}/{revision[0]}."
            )


def _is_pointer(path: Path) -> bool:
    with suppress(OSError):  # a link to nothing
        return path.stat().st_size < POINTER_BYTES and path.read_bytes().startswith(POINTER)
    return False


def _make_source(root: str, name: str, format: str) -> Source:
    path = f"{root}/{name}"
    is_local = not remote.is_remote(root)
    return Source(
        path=path,
        domain=find_domain(root, name, format),
        format=format,
        bytes=_size(path) if is_local else 0,
        splittable=is_local and name.endswith(".jsonl"),
    )


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}.") from error
