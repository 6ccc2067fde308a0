"""The whole preparation: plan, phase 1 in pieces, phase 2 in shards, manifest."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from apex_composer.data_prep.atomic_files import write_bytes, write_text
from apex_composer.data_prep.choose.budgets import check_budgets
from apex_composer.data_prep.choose.job_plan import (
    Plan,
    make_plan,
    read_plan,
    source_differences,
    write_plan,
)
from apex_composer.data_prep.engines.engine import Engine
from apex_composer.data_prep.errors import OutputTakenError, SettingsError
from apex_composer.data_prep.options import Options
from apex_composer.data_prep.output_folder import (
    begun_format,
    check_apart,
    check_ours,
    clear,
    locked,
    open_target,
)
from apex_composer.data_prep.paths import STREAMS, TOKENIZER_FILE, TOKENIZER_FOLDER, WORK
from apex_composer.data_prep.pieces import missing_pieces, tokenise_pieces
from apex_composer.data_prep.read.sources import Source, find_sources
from apex_composer.data_prep.tokens.tokenizer import TokenizerFacts, load_tokenizer
from apex_composer.data_prep.write.finish import finish
from apex_composer.data_prep.write.manifest import read_manifest, write_streams
from apex_composer.extras import require


def prepare(
    input: Path | str,
    out: Path | str,
    *,
    tokenizer: Path | str,
    options: Options | None = None,
    workers: int | None = None,
    engine: str = "local",
    address: str | None = None,
    shard: tuple[int, int] | None = None,
    overwrite: bool = False,
    keep_work: bool = False,
) -> dict[str, Any] | None:
    """Turn RedPajama-format text into `<out>/<split>/<domain>/` MDS shards.

    The output's bytes depend on the input and the options only. A run that was ended at any moment
    is continued by the same call, without redoing finished pieces and shards. With more than one
    worker a script needs `if __name__ == "__main__":` around the call.

    Args:
        input: folder or remote address, see `find_sources`.
        out: folder to write: shards, `tokenizer/`, `streams.yaml`, `rejects.jsonl`,
            `manifest.json` (last).
        tokenizer: folder, or name on the hub, of a tokenizer with a fast version.
        options: what to do. Default: Options().
        workers: tasks at the same time. Default: one for each core.
        engine: who does the work: `local` or `ray`. Default: "local".
        address: that of the Ray cluster, see `Engine`. Default: None.
        shard: (i, n), counted from 1: do only this part of phase 1, for `merge` to finish.
            Default: None.
        overwrite: remove an earlier preparation first, finished or not. Default: False.
        keep_work: keep `<out>/.work`. Default: False.

    Returns:
        The manifest, or None with `shard`.

    Raises:
        SettingsError: the options do not fit together or to the preparation in `out`.
        InputNotFoundError: there is no input; a SettingsError.
        OutputTakenError: `out` holds something else, or is in use; a SettingsError.
        OSError: the input cannot be read or the disk is full.
        ValueError: too many lines are unusable, or there is too little text.
        WorkerDiedError: a worker was killed; on Ray, several times at one task.
        MissingExtraError: a package of the extra `prep`, or `ray`, is not installed.
    """
    require("Data preparation", "prep")
    out, options = Path(out), options or Options()
    chosen = Engine(engine, address, workers)
    _check_part(shard)
    if overwrite and shard is not None:
        raise SettingsError(
            f"overwrite=True with shard={shard[0]}/{shard[1]} would remove what other parts have "
            "done. Remove the folder before the array job, and give --shard alone."
        )
    check_apart(input, out)
    format = options.format if overwrite else begun_format(input, out, options.format)
    sources = find_sources(input, format)
    check_budgets(options, sorted({s.domain for s in sources if s.domain is not None}))
    with tempfile.TemporaryDirectory(prefix="apex-prep-") as folder:
        description = load_tokenizer(str(tokenizer), Path(folder))
        if overwrite:
            check_ours(out)
        else:
            open_target(out, options, sources, description)  # before the lock writes anything
        with locked(out, shard):
            # Again: another process may have ended its work meanwhile.
            finished = None if overwrite else open_target(out, options, sources, description)
            if finished is not None:
                return _finish_again(out, finished, options)
            with chosen.opened(out) as map_tasks:  # before anything is removed: it may fail
                if overwrite:
                    clear(out)
                plan = _begin(out, sources, options, description, Path(folder))
                tokenise_pieces(out, plan, map_tasks, shard)
                check_unchanged(out, plan, sources)
                return None if shard else finish(out, plan, options, map_tasks, keep_work)


def _finish_again(out: Path, manifest: dict[str, Any], options: Options) -> dict[str, Any]:
    """What is left to do of a finished preparation."""
    named = manifest | {"options": manifest["options"] | {"streams_folder": options.streams_folder}}
    write_text(out / STREAMS, write_streams(named, out))
    shutil.rmtree(out / WORK, ignore_errors=True)
    return manifest


def _begin(
    out: Path,
    sources: list[Source],
    options: Options,
    description: TokenizerFacts,
    tokenizer_folder: Path,
) -> Plan:
    """The plan of the preparation that was begun, or a new one."""
    plan = read_plan(out)
    if plan is not None:
        return plan
    for path in sorted(tokenizer_folder.iterdir()):
        write_bytes(out / TOKENIZER_FOLDER / path.name, path.read_bytes())
    plan = make_plan(sources, options, description, out / TOKENIZER_FILE)
    write_plan(out, plan)
    return plan


def merge(
    out: Path | str,
    *,
    workers: int | None = None,
    engine: str = "local",
    address: str | None = None,
    max_reject_rate: float | None = None,
    keep_work: bool = False,
) -> dict[str, Any]:
    """Finish a preparation whose pieces were made by an array job.

    Args:
        out: folder that every `prepare(..., shard=...)` was given.
        workers: tasks at the same time. Default: one for each core.
        engine: who does the work: `local` or `ray`. Default: "local".
        address: that of the Ray cluster, see `Engine`. Default: None.
        max_reject_rate: in place of that of the array job. Default: None.
        keep_work: keep `<out>/.work`. Default: False.

    Returns:
        The manifest.

    Raises:
        SettingsError: there is no preparation, or a part of the array job is not done.
        Otherwise as `prepare`.
    """
    require("Data preparation", "prep")
    out, chosen = Path(out), Engine(engine, address, workers)
    plan = read_plan(out)
    if plan is None:
        finished = read_manifest(out)
        if finished is not None:
            return finished
        raise SettingsError(
            f"out={str(out)!r} holds no preparation to merge. Give the folder that "
            "`apex-composer prep --shard` wrote."
        )
    missing = missing_pieces(out, plan)
    if missing:
        raise SettingsError(
            f"{len(missing)} of {len(plan.pieces)} pieces are not done (the first is number "
            f"{missing[0]}). Give every part of the array job again: finished pieces are skipped. "
            f"With --shard I/N, piece P is done by I = P % N + 1."
        )
    options = plan.options
    if max_reject_rate is not None:
        options = replace(options, max_reject_rate=max_reject_rate)
    with locked(out, None), chosen.opened(out) as map_tasks:
        return finish(out, plan, options, map_tasks, keep_work)


def check_unchanged(out: Path, plan: Plan, sources: list[Source]) -> None:
    """Refuse input that was written to while it was read, and pieces of two plans.

    Raises:
        ValueError: a file differs from what it was when the run began; the message names it.
        OutputTakenError: the plan on disk is another one than the pieces were made by.
    """
    changes = source_differences(plan.sources, sources)
    if changes:
        raise ValueError(
            f"The input changed while it was read: {'; '.join(changes[:5])}. Start over with "
            "--overwrite when it is complete."
        )
    if read_plan(out) != plan:
        raise OutputTakenError(
            f"out={str(out)!r}: while this run made pieces, another one began it with another plan "
            "(perhaps by another version), so its pieces do not go together. Remove the folder and "
            "start over, every part with the same version."
        )


def _check_part(part: tuple[int, int] | None) -> None:
    """Refuse a part of an array job that does not exist.

    Raises:
        SettingsError: i is not in 1 to n.
    """
    if part is not None and not 1 <= part[0] <= part[1]:
        raise SettingsError(f"shard={part[0]}/{part[1]} must be I/N with I from 1 to N.")
