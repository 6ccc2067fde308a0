"""Checkpoints and prepared data of the time before the rooms are those of today."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from composer import Callback
from composer_run import make_trainer
from corpus import sentences, write_jsonl
from helpers import CHANGE_BOUND, SMOOTH_EPS, change_error, tiny_llama
from prepared import file_hashes, stored_sequences

from apex_composer import APEX, StagewiseScheduler
from apex_composer.callbacks.heartbeat import Heartbeat
from apex_composer.callbacks.preemption import Preemption
from apex_composer.callbacks.prepared_data import PreparedData
from apex_composer.data_prep import Options, check_manifest, merge, prepare, read_manifest, verify
from apex_composer.data_prep.choose import job_plan
from apex_composer.data_prep.tokens.document_hash import FIRST_HASH

BEFORE = Path(__file__).with_name("before_rooms")
CHECKPOINT = BEFORE / "ep0-ba5-rank0.pt"
STAGES = ["4ba", "3ba", "2ba"]
OPTIONS = Options(
    sequence_length=32,
    val_tokens=4 * 32,
    train_tokens=8 * 32,
    cpt_tokens=40 * 32,
    shard_bytes=1280,
    piece_bytes=4096,
)
# The tokenizer's name stands in the plan.
TOKENIZER = "./tokenizer"


class WeightsAt(Callback):
    """Keeps the weights of one batch's end."""

    def __init__(self, batch: int):
        self.batch, self.weights = batch, {}

    def batch_end(self, state, logger):
        if state.timestamp.batch.value == self.batch:
            self.weights = {n: w.clone() for n, w in state.model.model.state_dict().items()}


def test_a_checkpoint_goes_on_as_it_did(tmp_path):
    apex = APEX(stages=STAGES, threshold=0.25, kv_heads="expand", assessment={"tokens": 100})
    seen = WeightsAt(7)
    model = tiny_llama(kv_heads=2)
    trainer = make_trainer(
        apex,
        model=model,
        callbacks=(PreparedData(), Preemption(), Heartbeat(), seen),
        schedulers=StagewiseScheduler(stages=STAGES),
        max_duration="9ba",
        eps=SMOOTH_EPS,
        load_path=str(CHECKPOINT),
        save_folder=str(tmp_path),
        save_interval="9ba",
    )
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer.fit()
    saved = torch.load(CHECKPOINT, weights_only=False)["state"]["algorithms"][0][1]["apex"]
    trainer.close()
    assert apex.history[:2] == saved["history"]
    assert [record["start_batch"] for record in apex.history] == [0, 4, 7]
    for name, expected in torch.load(BEFORE / "weights-ba7.pt").items():
        assert change_error(seen.weights[name], expected, start[name]) < CHANGE_BOUND, name


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    """The text that was prepared, beside a copy of all that was made of it."""
    monkeypatch.chdir(tmp_path)
    for domain, first in (("book", 0), ("github", 100)):
        texts = [sentences(first + seed) for seed in range(13)]
        write_jsonl(tmp_path / "corpus" / domain / f"{domain}.jsonl", texts)
    shutil.copytree(BEFORE / "prepared", tmp_path / "prepared")
    shutil.copytree(BEFORE / "prepared" / "tokenizer", tmp_path / "tokenizer")
    return tmp_path / "corpus"


def go_on(work: Path, corpus: Path, options: Options) -> Path:
    """Finish what was begun as the first of two parts, in a new folder."""
    out = Path("begun")
    shutil.copytree(work, out / ".work")
    shutil.copytree("tokenizer", out / "tokenizer")
    path = out / ".work" / "plan.json"
    plan = json.loads(path.read_text().replace("CORPUS", str(corpus)))
    for source in plan["sources"]:
        os.utime(source["path"], ns=(source["modified_ns"], source["modified_ns"]))
    path.write_text(json.dumps(plan))
    prepare(corpus, out, options=options, tokenizer=TOKENIZER, workers=1, shard=(2, 2))
    merge(out, workers=1)
    return out


def test_prepared_data_is_read(corpus):
    manifest = read_manifest(Path("prepared"))
    assert verify(Path("prepared")) == []
    check_manifest(Path("prepared/cpt/book"), manifest["tokenizer"]["sha256"], 320, 32)
    sequences = stored_sequences(Path("prepared/cpt/book"))
    assert len(sequences) == manifest["splits"]["cpt"]["book"]["sequences"] == 20


def test_data_prepared_today_under_the_first_hash_are_the_same(corpus, monkeypatch):
    monkeypatch.setattr(job_plan, "NEWEST_HASH", FIRST_HASH)
    prepare(corpus, Path("today"), options=OPTIONS, tokenizer=TOKENIZER, workers=1)
    shards = {name: digest for name, digest in file_hashes(Path("today")).items() if "/" in name}
    before = file_hashes(Path("prepared"))
    assert {name: before.get(name) for name in shards} == shards


def test_an_interrupted_preparation_is_finished(corpus):
    out = go_on(BEFORE / "interrupted" / "work", corpus, OPTIONS)
    before, after = file_hashes(Path("prepared")), file_hashes(out)
    assert {name for name in before if before[name] != after.get(name)} <= {"manifest.json"}


def test_a_job_of_the_first_hash_ends_under_it(corpus, tmp_path):
    """No validation text moves into training: every byte is as the code before made it."""
    corpus = tmp_path / "other"
    for domain, first in (("book", 0), ("github", 10)):
        texts = [sentences(first + seed) for seed in range(20)]
        write_jsonl(corpus / domain / f"{domain}.jsonl", [*texts, *texts[:5]])
    options = replace(OPTIONS, cpt_tokens=24 * 32, streams_folder="/prepared")
    out = go_on(BEFORE / "first_hash" / "work", corpus, options)
    assert verify(out, workers=1) == []
    expected, found = (
        json.loads(path.read_text().replace("CORPUS", str(corpus)))
        for path in (BEFORE / "first_hash" / "manifest.json", out / "manifest.json")
    )
    assert expected.pop("sha256") and found.pop("sha256")  # also of the path of the corpus
    assert found == expected
    assert found["read"]["book"]["documents_not_tokenised"] == 9
    assert found["read"]["github"]["documents_duplicates"] == 3
    again = {"options": options, "tokenizer": TOKENIZER, "workers": 1}
    assert prepare(corpus, out, **again) == read_manifest(out)
