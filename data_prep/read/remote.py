"""Read inputs from a remote store, through streaming's own download.

streaming imports torch, so it is imported only when an input is remote.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

from apex_composer.data_prep.errors import InputNotFoundError, SettingsError
from apex_composer.extras import require

FILE_SCHEME = "file"  # a folder of this machine, read as a remote store is
DOWNLOAD_SECONDS = 4 * 3600.0
ATTEMPTS = 3


def is_remote(address: str | Path) -> bool:
    """Whether an address names a remote store, such as `s3://bucket/folder`."""
    return isinstance(address, str) and "://" in address


def streaming_name(address: str) -> str:
    """What streaming calls a remote file or folder: its address, of `file://` the path."""
    parts = urlparse(address)
    return parts.path if parts.scheme == FILE_SCHEME else address


def list_files(address: str) -> list[str]:
    """List the files below a remote folder, sorted, as paths below it.

    Args:
        address: remote folder.

    Raises:
        InputNotFoundError: there is nothing.
        SettingsError: streaming knows no such store, or cannot list it.
        OSError: the store cannot be reached.
        MissingExtraError: streaming is not installed.
    """
    require(f"input={address!r}", "remote")
    parts = urlparse(address)
    if parts.scheme == FILE_SCHEME:
        root = Path(parts.path)
        below = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    else:
        prefix = parts.path.strip("/")
        prefix += "/" if prefix else ""
        try:
            names = _list_objects(address)
        except (ImportError, KeyError, NotImplementedError, ValueError) as error:
            raise SettingsError(
                f"input={address!r} cannot be listed by streaming: {error}. Mount it, or copy it "
                "to a local folder."
            ) from error
        except Exception as error:  # every store has its own errors
            raise OSError(f"input={address!r} cannot be listed: {error}") from error
        below = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    if not below:
        raise InputNotFoundError(f"input={address!r} holds no file.")
    return sorted(below)


def _list_objects(address: str) -> list[str]:
    from streaming.base.storage import CloudUploader

    # streaming's listing is part of its uploaders; nothing is written.
    uploader = CloudUploader.get(address)
    try:
        return uploader.list_objects()
    finally:
        os.rmdir(uploader.local)  # the scratch folder that every remote uploader makes


@contextmanager
def local_copy(address: str, cache: Path | None = None, attempts: int = ATTEMPTS) -> Iterator[Path]:
    """Download a remote file for as long as it is read; a local path is given back as it is.

    Args:
        address: file, remote or of this machine.
        cache: folder with room for the file. Default: None, the system's folder for such files.
        attempts: at the download. Default: 3.

    Raises:
        OSError: the download failed, every time.
        ValueError: streaming knows no such store.
        MissingExtraError: streaming is not installed.
    """
    if not is_remote(address):
        yield Path(address)
        return
    require(address, "remote")
    from streaming.base.storage import CloudDownloader

    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="apex-prep-", dir=cache) as folder:
        path = Path(folder) / Path(urlparse(address).path).name
        for attempt in range(1, attempts + 1):
            try:
                CloudDownloader.direct_download(
                    streaming_name(address), str(path), DOWNLOAD_SECONDS
                )
                break
            except ValueError:
                raise
            except Exception as error:  # every store has its own errors
                if attempt == attempts:
                    raise OSError(f"{address} cannot be downloaded: {error}") from error
        yield path
