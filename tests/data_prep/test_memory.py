import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
from corpus import sentences
from prepared import tokenizer_folder

from apex_composer.data_prep.paths import TOKENIZER_FOLDER
from apex_composer.data_prep.read.documents import LINE_LIMIT
from apex_composer.data_prep.read.sources import Source
from apex_composer.data_prep.tokens.document_hash import NEWEST_HASH
from apex_composer.data_prep.tokens.piece import PieceTask
from apex_composer.data_prep.tokens.tokenizer import TokenizerFacts

LARGEST = 1_000  # MB of a worker
WORKER = """
import json, pickle, re, sys
from pathlib import Path
from apex_composer.data_prep.tokens.piece import tokenise_piece
report = tokenise_piece(pickle.load(sys.stdin.buffer), lambda news: None)
print(json.dumps([report.documents, report.rejects]))
# Not getrusage: its peak counts the parent's memory too, from before the program was started.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3)
"""


def work_on(path: Path, part: float = 1.0) -> tuple[list, float]:
    """Documents and rejects of a file, of which a part is tokenised, and the megabytes it took."""
    size, splittable = path.stat().st_size, path.suffix == ".jsonl"
    task = PieceTask(
        out=path.parent,
        number=0,
        source=Source(str(path), "book", "jsonl", size, splittable),
        start=0,
        stop=None,
        kept={"book": part},
        tokenizer=TokenizerFacts("t", "", vocabulary_size=320, bos=0, eos=1),
        document_hash=NEWEST_HASH,
    )
    shutil.copytree(tokenizer_folder(), path.parent / TOKENIZER_FOLDER)
    command = [sys.executable, "-c", WORKER]
    result = subprocess.run(command, input=pickle.dumps(task), capture_output=True, check=True)
    counts, megabytes = map(json.loads, result.stdout.splitlines())
    return counts, megabytes


def test_an_archive_of_5_gb_in_one_line_is_rejected_within_the_memory_of_a_worker(tmp_path):
    codec = pyarrow.Codec("zstd")
    blanks = codec.compress(b" " * 50_000_000, asbytes=True)
    start = codec.compress(b'{"text": "good"}\n{"text": "', asbytes=True)
    end = codec.compress(b'"}\n{"text": "also good"}\n', asbytes=True)
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(start + 100 * blanks + end)
    counts, megabytes = work_on(path)
    assert counts == [2, {"book": {"too long": 1}}]
    assert megabytes < LARGEST


def test_the_largest_document_is_tokenised_within_the_memory_of_a_worker(tmp_path):
    path = tmp_path / "x.jsonl.zst"  # a plain file takes less
    block = sentences(0).encode() + b" "
    # One emoji, and Python needs four bytes for every character.
    start, end = b'{"text": "\xf0\x9f\x98\x80 ', b'."}\n'
    count = (LINE_LIMIT - len(start) - len(end)) // len(block)
    with pyarrow.output_stream(str(path), compression="detect") as file:
        file.write(start + block * count + end)
    counts, megabytes = work_on(path)
    assert counts == [1, {}]
    assert megabytes < LARGEST


def test_long_rows_of_parquet_are_read_within_the_memory_of_a_worker(tmp_path):
    text = sentences(0) + " "
    text *= 5_000_000 // len(text)
    # One page of nearly the largest size that is read.
    table = pyarrow.table({"text": [f"{n} {text}" for n in range(64)], "meta": ["{}"] * 64})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=64)
    # A tenth of them are tokenised, which takes no more memory than one document does.
    counts, used = work_on(tmp_path / "x.parquet", 0.1)
    assert counts == [64, {}]
    assert used < LARGEST
