"""The `index.json` files of streaming, which follow from the manifest alone."""

from pathlib import Path
from typing import Any

from apex_composer.data_prep.paths import INDEX
from apex_composer.data_prep.write.mds import describe_columns, encode_index, index_entry


def shard_entries(manifest: dict[str, Any], stream: str) -> list[dict[str, Any]]:
    """What `index.json` says of the shards of a stream.

    Args:
        manifest: of the preparation.
        stream: `<split>/<domain>`.
    """
    options = manifest["options"]
    header = describe_columns(
        manifest["dtype"],
        options["sequence_length"],
        options["shard_bytes"],
        options["compression"],
    )
    return [
        index_entry(
            number,
            file["sequences"],
            file["raw_bytes"],
            None if options["compression"] is None else file["bytes"],
            header,
        )
        for number, file in enumerate(manifest["shards"][stream])
    ]


def index_files(manifest: dict[str, Any]) -> dict[str, bytes]:
    """All index files: one of each stream, and one of each split that names the shards of all.

    Args:
        manifest: of the preparation.

    Returns:
        Contents by their path below the output folder.
    """
    contents, splits = {}, {}
    for stream in manifest["shards"]:
        split, domain = stream.split("/")
        entries = shard_entries(manifest, stream)
        contents[f"{stream}/{INDEX}"] = encode_index(entries)
        splits.setdefault(split, []).extend(_below(domain, entry) for entry in entries)
    contents |= {f"{split}/{INDEX}": encode_index(entries) for split, entries in splits.items()}
    return contents


def _below(folder: str, entry: dict[str, Any]) -> dict[str, Any]:
    """An entry as `streaming.base.util.merge_index` writes it: with its folder before the name."""
    moved = dict(entry)
    for name in ("raw_data", "zip_data"):
        if entry[name] is not None:
            moved[name] = entry[name] | {"basename": str(Path(folder, entry[name]["basename"]))}
    return moved
