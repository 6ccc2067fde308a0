"""Every name of the on-disk layout, below the output folder.

<split>/<domain>/shard.00000.mds    (the format is MDS': write/mds.py)
<split>/<domain>/index.json, <split>/index.json
tokenizer/, rejects.jsonl, streams.yaml, manifest.json
.uploaded.json                      while an upload is under way
.work/                              until the preparation is finished
"""

from pathlib import Path

MANIFEST = "manifest.json"
STREAMS = "streams.yaml"
TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_FILE = f"{TOKENIZER_FOLDER}/tokenizer.json"
INDEX = "index.json"
# Of the whole output, and of every piece.
REJECTS = "rejects.jsonl"
# Names of the files that an unfinished upload has done; never uploaded.
UPLOADED = ".uploaded.json"

WORK = ".work"
PLAN = f"{WORK}/plan.json"
DOWNLOADS = f"{WORK}/downloads"
# Of a whole preparation; the parts of an array job have one more each.
LOCK = f"{WORK}/lock"
# By which the nodes of a cluster know the folder; it has the name of what is half-written.
DRIVER = f"{WORK}/driver"
# In how many parts the array job runs.
PARTS = f"{WORK}/parts.json"
PIECES = f"{WORK}/pieces"
# What the manifest will say of every shard that is written.
SHARDS = f"{WORK}/shards"

# In the folder of a piece.
TOKENS = "tokens.bin"
DOCUMENTS = "documents.bin"
REPORT = "report.json"


def piece_folder(out: Path, number: int) -> Path:
    """Folder of a piece.

    Args:
        out: output folder.
        number: of the piece, from 0.
    """
    return out / PIECES / f"{number:06d}"
