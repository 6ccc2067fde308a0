"""Copy a finished preparation to a remote store, through streaming's own upload.

streaming imports torch, so it is imported only here.
"""

from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from tqdm import tqdm

from apex_composer.data_prep.atomic_files import read_json, write_json, write_text
from apex_composer.data_prep.errors import SettingsError
from apex_composer.data_prep.paths import MANIFEST, STREAMS, UPLOADED
from apex_composer.data_prep.progress import progress_bar
from apex_composer.data_prep.read.remote import FILE_SCHEME, is_remote, streaming_name
from apex_composer.data_prep.write.manifest import output_files, read_finished, write_streams
from apex_composer.extras import require


def upload(out: Path | str, address: str) -> None:
    """Upload shards, tokenizer and, last, the manifest; `streams.yaml` then names the store.

    An upload that was ended at any moment is continued by the same call.

    Args:
        out: folder that `prepare` was given.
        address: remote folder, such as `s3://bucket/redpajama`.

    Raises:
        SettingsError: there is no finished preparation, or the address is not a remote one.
        OSError: a file cannot be uploaded, three times.
        MissingExtraError: streaming is not installed.
    """
    out, address = Path(out), address.rstrip("/")
    manifest = read_finished(out)
    check_address(address)
    write_text(out / STREAMS, write_streams(manifest, out, address))
    folders: dict[str, list[str]] = {}
    for name in map(Path, (*output_files(manifest), STREAMS, MANIFEST)):
        folders.setdefault(str(name.parent), []).append(name.name)
    begun = {"address": address, "manifest": manifest["sha256"], "files": []}
    earlier = read_json(out / UPLOADED)
    if earlier is not None and earlier | {"files": []} == begun:
        begun = earlier
    count = sum(map(len, folders.values()))
    with progress_bar(total=count, unit=" files", desc="uploading") as bar:
        for folder in sorted(folders, key=lambda folder: folder == "."):  # with the manifest
            _upload_folder(out, folder, folders[folder], begun, bar)
    (out / UPLOADED).unlink()


def check_address(address: str) -> None:
    """Refuse an address that names no remote store.

    Raises:
        SettingsError: it is a local path, or of a store that streaming does not know.
        MissingExtraError: streaming is not installed.
    """
    if not is_remote(address):
        raise SettingsError(f"upload={address!r} must be an address such as s3://bucket/folder.")
    require(f"upload={address!r}", "remote")
    from streaming.base.storage.upload import UPLOADERS

    known = sorted({name.split(":")[0] for name in UPLOADERS if name} | {FILE_SCHEME})
    if urlparse(address).scheme not in known:
        raise SettingsError(
            f"upload={address!r} is of no store that streaming knows: {', '.join(known)}."
        )


def _upload_folder(
    out: Path, folder: str, names: list[str], begun: dict[str, Any], bar: tqdm
) -> None:
    from streaming.base.storage import CloudUploader

    address = f"{begun['address']}/{folder}".removesuffix("/.")
    places = (str(out / folder), streaming_name(address))
    try:
        uploader = CloudUploader.get(places, keep_local=True, exist_ok=True)
        for name in names:
            if f"{folder}/{name}" not in begun["files"]:
                uploader.upload_file(name)
                begun["files"].append(f"{folder}/{name}")
                write_json(out / UPLOADED, begun)
            bar.update()
    except (ImportError, KeyError) as error:
        raise SettingsError(f"upload={address!r}: streaming has no such store: {error}.") from error
    except Exception as error:  # every store has its own errors
        raise OSError(f"{address} cannot be written: {error}. Give the same again.") from error
