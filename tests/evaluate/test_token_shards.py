"""Token shards equal what streaming reads, in any order, and what does not fit is refused."""

import numpy as np
import pytest
from prepared import tokenizer_folder
from streaming import MDSWriter
from streaming.base.format.base import writer as writer_of_streaming
from transformers import AutoTokenizer

from apex_composer.evaluate.token_shards import TokenShards


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tokenizer_folder())


@pytest.mark.parametrize("encoding", ["ndarray:uint16:8", "ndarray:int32", "bytes"])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_every_sequence_is_found_in_any_order(
    tokenizer, tmp_path, monkeypatch, encoding, compression
):
    monkeypatch.setattr(writer_of_streaming, "sleep", lambda _: None)  # a second for its own queue
    rows = np.random.default_rng(0).integers(0, 320, (50, 8))
    kind = {"bytes": np.int64}.get(encoding) or np.dtype(encoding.split(":")[1])
    options = {"columns": {"tokens": encoding}, "compression": compression, "size_limit": 700}
    with MDSWriter(out=str(tmp_path), **options) as writer:
        for row in rows.astype(kind):
            writer.write({"tokens": row.tobytes() if encoding == "bytes" else row})
    shards = TokenShards(tmp_path, tokenizer, 8)
    assert len(shards) == 50 and len(shards.shards) > 1
    for place in (49, 0, *range(50)):
        assert shards[place].tolist() == rows[place].tolist()


@pytest.mark.parametrize(
    ("token", "length", "message"),
    [(400, 8, "has the token 400, and the tokenizer 320 tokens"), (5, 4, "give 8")],
)
def test_shards_without_a_manifest_are_looked_at(tokenizer, tmp_path, token, length, message):
    with MDSWriter(out=str(tmp_path / "a"), columns={"tokens": "ndarray:uint16:8"}) as writer:
        writer.write({"tokens": np.full(8, token, dtype=np.uint16)})
    with pytest.raises(ValueError, match=message):
        TokenShards(tmp_path / "a", tokenizer, length)[0]


def test_shards_of_texts_are_refused(tokenizer, tmp_path):
    with MDSWriter(out=str(tmp_path / "a"), columns={"text": "str"}) as writer:
        writer.write({"text": "a"})
    with pytest.raises(ValueError, match="has the columns text: needed is `tokens`"):
        TokenShards(tmp_path / "a", tokenizer, 8)
