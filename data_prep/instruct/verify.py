"""Read finished instruction data again: every byte, and every token that the loader makes of it."""

from pathlib import Path
from typing import Any

from apex_composer.data_prep.choose.job_plan import make_pieces
from apex_composer.data_prep.engines.engine import Engine, MapTasks
from apex_composer.data_prep.errors import SettingsError
from apex_composer.data_prep.instruct.manifest import (
    Manifest,
    all_sources,
    read_instruct_manifest,
    sum_reports,
)
from apex_composer.data_prep.instruct.options import SPLIT_FILES, InstructOptions
from apex_composer.data_prep.instruct.piece import (
    ExamplesReport,
    ExamplesTask,
    Progress,
    read_piece,
)
from apex_composer.data_prep.paths import MANIFEST
from apex_composer.data_prep.progress import progress_bar
from apex_composer.data_prep.read.sources import Source
from apex_composer.data_prep.write.manifest import hash_content
from apex_composer.data_prep.write.verify import check_files, check_names


def verify_instruct(
    out: Path | str,
    *,
    workers: int | None = None,
    engine: str = "local",
    address: str | None = None,
) -> list[str]:
    """Check every byte, tokenise every example again and compare the counts with the manifest.

    Args:
        out: folder that `prepare_instruct` was given.
        workers: tasks at the same time. Default: one for each core.
        engine: who does the work: `local` or `ray`. Default: "local".
        address: that of the Ray cluster, see `Engine`. Default: None.

    Returns:
        What is wrong, one line each; empty when all is well.

    Raises:
        SettingsError: there is no finished instruction data.
    """
    out, chosen = Path(out), Engine(engine, address, workers)
    manifest = read_instruct_manifest(out)
    if manifest is None:
        raise SettingsError(f"out={str(out)!r} holds no finished instruction data ({MANIFEST}).")
    if manifest.get("sha256") != hash_content(manifest):
        return [f"{MANIFEST}: it was changed after it was written (sha256), so nothing is checked"]
    hashes = {name: file["sha256"] for name, file in manifest["files"].items()}
    with chosen.opened(out, MANIFEST) as map_tasks:
        faults = check_names(out, list(hashes), (MANIFEST,)) + check_files(out, hashes, map_tasks)
        # Examples that have changed, or that a changed tokenizer reads, have other counts.
        return sorted(faults or _recount(out, manifest, map_tasks))


def _recount(out: Path, manifest: Manifest, map_tasks: MapTasks) -> list[str]:
    """Read what was written as input was read; the manifest's numbers must come out again."""
    names = ("sequence_length", "validation_share", "piece_bytes")
    options = InstructOptions(**{name: manifest["settings"][name] for name in names})
    paths = [out / name for split, name in SPLIT_FILES.items() if split in manifest["splits"]]
    sources = [Source(str(path), None, "jsonl", path.stat().st_size, True) for path in paths]
    pieces = [
        ExamplesTask(out, number, sources[piece.source], piece.start, piece.stop, options)
        for number, piece in enumerate(make_pieces(sources, options.piece_bytes))
    ]
    tasks = ({"name": piece.name, "piece": piece} for piece in pieces)
    shown = {"unit": "B", "unit_scale": True, "desc": "counting"}
    with progress_bar(total=sum(source.bytes for source in sources), **shown) as bar:

        def advance(news: dict[str, Any]) -> None:
            bar.update(news["characters"])

        reports = [report for _, report in map_tasks(_recount_piece, tasks, advance, len(pieces))]
    counts = sum_reports(reports)
    found = (all_sources(counts["splits"]), counts["lengths"], counts["rejects"])
    expected = (all_sources(manifest["splits"]), manifest["lengths"], {})
    return [
        f"{MANIFEST}: {name} were {before} and are {now} with this tokenizer and these versions"
        for name, before, now in zip(("splits", "lengths", "rejects"), expected, found, strict=True)
        if now != before
    ]


def _recount_piece(task: dict[str, Any], report_progress: Progress) -> ExamplesReport:
    return read_piece(task["piece"], report_progress, lambda *example: None, lambda *reject: None)
