"""The manifest of instruction data: what was counted, and what was written."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from apex_composer.data_prep.atomic_files import read_json
from apex_composer.data_prep.instruct.piece import Counts, ExamplesReport, add_counts
from apex_composer.data_prep.paths import MANIFEST
from apex_composer.data_prep.write.manifest import hash_content

FORMAT = "apex-composer instruct 1"
NUMBERS = ("examples", "tokens", "response_tokens", "mean", "longest")

# What `manifest.json` holds; `make_manifest` lists its keys, data_prep/README.md explains them.
Manifest = dict[str, Any]


def make_manifest(
    settings: Mapping[str, Any], reports: list[ExamplesReport], files: Mapping[str, Any]
) -> Manifest:
    """Put together what `manifest.json` holds.

    Args:
        settings: all that decides the output's bytes.
        reports: those of all pieces.
        files: bytes and sha256 of every other file of the output.
    """
    counts = sum_reports(reports)
    content = {"format": FORMAT, "settings": dict(settings), **counts, "files": dict(files)}
    return content | {"sha256": hash_content(content)}


def sum_reports(reports: Iterable[ExamplesReport]) -> Counts:
    """The counts of all pieces."""
    total: Counts = {}
    for report in reports:
        add_counts(total, report.counts)
    return total


def all_sources(splits: Mapping[str, Counts]) -> dict[str, Counts]:
    """Per split, the counts of its sources together."""
    totals: dict[str, Counts] = {split: {} for split in splits}
    for split, sources in splits.items():
        for counts in sources.values():
            add_counts(totals[split], counts)
    return totals


def read_instruct_manifest(out: Path) -> Manifest | None:
    """Read the manifest of finished instruction data of this version; None where there is none."""
    manifest = read_json(out / MANIFEST)
    is_ours = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    return manifest if is_ours else None


def make_tables(manifest: Manifest) -> list[Table]:
    """What was counted, for the console: by split and source, by length, and what was rejected."""
    counted = _table("split", "source", *(name.replace("_", " ") for name in NUMBERS))
    totals = all_sources(manifest["splits"])
    for split, sources in manifest["splits"].items():
        for source, counts in [*sources.items(), ("all", totals[split])]:
            counts = counts | {"mean": round(counts["tokens"] / counts["examples"])}
            counted.add_row(split, source, *(f"{counts[name]:,}" for name in NUMBERS))
        counted.add_section()
    lengths = _table("tokens at most", *manifest["lengths"])
    for bound in sorted({int(b) for bounds in manifest["lengths"].values() for b in bounds}):
        row = (bounds.get(str(bound), 0) for bounds in manifest["lengths"].values())
        lengths.add_row(f"{bound:,}", *(f"{number:,}" for number in row))
    rejects = _table("source", "rejected because", "lines")
    for source, reasons in manifest["rejects"].items():
        for reason, lines in reasons.items():
            rejects.add_row(source, reason, f"{lines:,}")
    return [counted, lengths, *([rejects] if manifest["rejects"] else [])]


def _table(*columns: str) -> Table:
    words = ("split", "source", "rejected because")
    return Table(*(Column(c, justify="left" if c in words else "right") for c in columns))
