"""Tell the format of an input by the names of its files, its first records and its columns."""

import re
from collections import defaultdict
from contextlib import suppress
from itertools import islice
from typing import Any

from apex_composer.data_prep.errors import InputNotFoundError, Rejected, SettingsError, SourceError
from apex_composer.data_prep.read import remote
from apex_composer.data_prep.read.domains import (
    LLAMA1,
    SAMPLE_FIELD,
    normalise_domain,
    slimpajama_domain,
)
from apex_composer.data_prep.read.formats import (
    ATTRIBUTES,
    FORMATS,
    JSON_ARCHIVE,
    JSONL,
    SAMPLE_NAME,
    belongs,
)
from apex_composer.data_prep.read.lines import open_lines, read_lines

SNIFFED_LINES, SNIFFED_FILES = 20, 20
SNIFFED_BYTES = 10_000_000
# What every record of Dolma has, and those of other formats do not have together.
DOLMA_KEYS = {"id", "text", "source", "added"}
FINEWEB_COLUMNS = {"text", "dump", "language"}
SAMPLE_COLUMNS = {"meta", SAMPLE_FIELD, "wiki_prob", "pred_label"}
PARQUET = "fineweb or redpajama-sample"
V2_BESIDE = re.compile(r"(^|/)(duplicates|minhash)/")  # parquet without text


def detect_format(root: str, names: list[str]) -> str:
    """Tell the format, or ask for it.

    Args:
        root: the input.
        names: paths of its files.

    Raises:
        SettingsError: several formats fit, or none is shown.
        InputNotFoundError: there is no file of any format.
        SourceError: a file cannot be read.
    """
    archives = [name for name in names if belongs(name, "redpajama-v2")]
    sample = [name for name in names if SAMPLE_NAME.fullmatch(name.rpartition("/")[2])]
    jsonl = [name for name in names if name.endswith(JSONL) and name not in sample]
    found = _detect_by_records(root, jsonl + archives)
    found["arrow"] = [name for name in names if belongs(name, "arrow")]
    parquet = [name for name in names if name.endswith(".parquet")]
    if archives:
        parquet = [name for name in parquet if not V2_BESIDE.search(name)]
    found["redpajama-sample" if sample else PARQUET] = sample + parquet
    found = {format: files for format, files in found.items() if files}
    if not found:
        raise InputNotFoundError(
            f"{root!r} holds no file of any known format: "
            + "; ".join(f"{format} is {layout}" for format, layout in FORMATS.items())
        )
    format = _the_only(root, {format: files[0] for format, files in found.items()})
    return _detect_by_columns(root, parquet) if format == PARQUET else format


def _the_only(root: str, found: dict[str, str]) -> str:
    """The format, of which a file is named, where there is but one."""
    if len(found) > 1:
        shown = "; ".join(f"{format}: {name}" for format, name in found.items())
        raise SettingsError(
            f"{root!r} holds files of several formats ({shown}). Give format= (on the command "
            "line --format) to read one of them, or a folder that holds only one."
        )
    return next(iter(found))


def _first_of_folders(names: list[str]) -> list[list[str]]:
    """The first files of every folder of the input, and of each of its two kinds of name."""
    first: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for name in names:
        folder = name.split("/")[0] if "/" in name else ""
        first[folder, name.endswith(JSON_ARCHIVE)].append(name)
    return [files[:SNIFFED_FILES] for files in first.values()]


def _detect_by_records(root: str, names: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for files in _first_of_folders([name for name in names if not ATTRIBUTES.search(name)]):
        found.setdefault(_format_of(root, files), []).append(files[0])
    other = found.pop("", [])
    known = all(normalise_domain(name.split("/")[0]) in LLAMA1 for name in other)
    return {**found, "redpajama-v1" if known else "jsonl": other}


def _format_of(root: str, names: list[str]) -> str:
    """The format that the first good record of some files shows, "" for jsonl that shows none."""
    for name in names:  # the first of them may be empty
        if record := _first_record(root, name):
            break
    if DOLMA_KEYS <= record.keys() and isinstance(record["source"], str):
        return "dolma"
    if not name.endswith(JSON_ARCHIVE):
        return "" if slimpajama_domain(record.get("meta")) is None else "slimpajama"
    if "raw_content" in record:
        return "redpajama-v2"
    raise SettingsError(
        f"{root}/{name}: its first record has the keys {sorted(record)}, which are neither those "
        f"of redpajama-v2 (raw_content) nor of dolma ({', '.join(sorted(DOLMA_KEYS))}). Give "
        "format= (on the command line --format): dolma needs only text and source."
    )


def _first_record(root: str, name: str) -> dict[str, Any]:
    """The first good record of a file, empty where there is none among its first lines."""
    with remote.local_copy(f"{root}/{name}") as path:
        try:
            with open_lines(path) as stream:
                for line in islice(read_lines(stream, 0, SNIFFED_BYTES), SNIFFED_LINES):
                    with suppress(Rejected):
                        return line.parse()
        except (EOFError, OSError, ValueError) as error:
            raise SourceError(f"{root}/{name} cannot be read at its first line: {error}") from error
    return {}


def _detect_by_columns(root: str, names: list[str]) -> str:
    """Tell FineWeb's parquet from that of RedPajama's sample, or ask."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_schema

    found: dict[str, str] = {}
    for name, *_ in _first_of_folders(names):
        with remote.local_copy(f"{root}/{name}") as path:
            try:
                columns = set(read_schema(path).names)
            except (OSError, ValueError, ArrowException) as error:
                raise SourceError(f"{root}/{name} cannot be read: {error}") from error
        is_fineweb, is_sample = columns >= FINEWEB_COLUMNS, bool(columns & SAMPLE_COLUMNS)
        if is_fineweb == is_sample:
            raise SettingsError(
                f"{root}/{name}: its columns ({', '.join(sorted(columns))}) do not show whether it "
                "is fineweb or redpajama-sample. Give format= (on the command line --format): "
                "fineweb takes the column text and names domains by folders, redpajama-sample by "
                "each record's meta."
            )
        found.setdefault("fineweb" if is_fineweb else "redpajama-sample", name)
    return _the_only(root, found)
