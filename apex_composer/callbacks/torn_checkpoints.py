"""What a kill during a save leaves behind: torn files, and a `latest` link that lags or is gone.

Composer writes a checkpoint under its final name, removes the link `latest` and makes it anew.
Killed in between, the next start does not read the torn file, but refuses to train at all, because
the file looks like a later checkpoint of the same run; or it finds no link and starts from nothing.
"""

import os
import re
import zipfile
from pathlib import Path

TORN = ".torn"


def repair(folder: Path, filename: str, latest: str) -> list[str]:
    """Put torn checkpoints aside and point the link at the newest whole one.

    Args:
        folder: local folder of the checkpoints.
        filename: Composer's `save_filename`, for example `ep{epoch}-ba{batch}-rank{rank}.pt`.
        latest: Composer's `save_latest_filename`.

    Returns:
        What was done, one sentence each; nothing for checkpoints of a kind not known here
        (folders of shards, compressed files).
    """
    link = folder / latest.replace("{rank}", "0")
    if "{batch}" not in filename or not filename.endswith(".pt"):
        return []
    if not folder.is_dir() or link.is_dir():  # a link to a folder: sharded checkpoints
        return []
    done, whole = [], []
    for _, path in sorted(_checkpoints(folder, filename)):
        if zipfile.is_zipfile(path):
            whole.append(path)
            continue
        # Kept, because a file that cannot be read here may still be looked at elsewhere.
        path.rename(path.with_name(path.name + TORN))
        done.append(
            f"{path} is torn (a save was killed), it was renamed to *{TORN} and can be deleted"
        )
    if whole and _lags(link, whole[-1]):
        partial = link.with_name(link.name + ".partial")
        partial.unlink(missing_ok=True)
        partial.symlink_to(whole[-1].name)
        os.replace(partial, link)
        done.append(f"{link} points to {whole[-1].name} now, the newest whole checkpoint")
    elif link.is_symlink() and not link.exists():
        link.unlink()
        done.append(f"{link} pointed to no whole checkpoint and was removed: training starts anew")
    return done


def _checkpoints(folder: Path, filename: str) -> list[tuple[int, Path]]:
    """Checkpoint files by batch; only rank 0 writes them."""
    pattern = re.escape(filename).replace(r"\{", "{").replace(r"\}", "}")
    pattern = pattern.replace("{batch}", r"(?P<batch>\d+)").replace("{rank}", "0")
    template = re.compile(re.sub(r"\{\w+\}", r"[^/]+?", pattern))
    matches = [(template.fullmatch(path.name), path) for path in folder.iterdir()]
    return [
        (int(match["batch"]), path) for match, path in matches if match and not path.is_symlink()
    ]


def _lags(link: Path, newest: Path) -> bool:
    """Whether a save ended before its link was made.

    A link younger than the newest file was set by somebody who wants an older checkpoint.
    """
    if not link.exists():
        return True
    if not link.is_symlink() or link.resolve() == newest.resolve():
        return False
    return newest.stat().st_mtime > link.lstat().st_mtime
