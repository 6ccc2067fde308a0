"""What `prep_throughput.py` compares: our pipeline, llm-foundry's converter, tokenising alone."""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

BATCH_CHARACTERS = 1 << 19


def run_ours(arguments: argparse.Namespace, work: Path, kind: str) -> dict[str, float]:
    """Our pipeline: seconds, tokens in its shards, and their bytes."""
    from apex_composer.data_prep.options import Options
    from apex_composer.data_prep.preparation import prepare

    with tempfile.TemporaryDirectory(dir=work) as folder:
        out = Path(folder) / "out"
        # Pieces small enough that both cores have work to the end, as they do in a large job.
        options = Options(sequence_length=arguments.sequence, val_tokens=None, piece_bytes=1 << 20)
        start = time.perf_counter()
        prepare(
            work / kind,
            out,
            tokenizer=arguments.tokenizer,
            options=options,
            workers=arguments.cores,
        )
        return {"seconds": time.perf_counter() - start, **measure_shards(out, arguments.sequence)}


def run_llmfoundry(arguments: argparse.Namespace, work: Path, kind: str) -> dict[str, float]:
    """llm-foundry's converter: seconds, tokens in its shards, and their bytes."""
    from llmfoundry.command_utils.data_prep.convert_dataset_json import convert_dataset_json

    with tempfile.TemporaryDirectory(dir=work) as folder:
        os.environ["HF_DATASETS_CACHE"] = folder  # else the second run finds the first one's
        import datasets
        from transformers import AutoTokenizer

        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        out = Path(folder) / "out"
        start = time.perf_counter()
        convert_dataset_json(
            path=str(work / f"{kind}-flat"),
            out_root=str(out),
            compression=None,
            concat_tokens=arguments.sequence,
            split="train",
            tokenizer=arguments.tokenizer,
            eos_text=AutoTokenizer.from_pretrained(arguments.tokenizer).eos_token,
        )
        return {"seconds": time.perf_counter() - start, **measure_shards(out, arguments.sequence)}


def run_in_memory(
    arguments: argparse.Namespace, work: Path, kind: str, encode: Callable[[list[str]], list[Any]]
) -> dict[str, float]:
    """A tokenizer alone on texts in memory: seconds and tokens."""
    batches, batch, characters = [], [], 0
    for path in sorted((work / kind).rglob("*.jsonl")):
        for line in path.read_text().splitlines():
            text = json.loads(line)["text"]
            batch.append(text)
            characters += len(text)
            if characters >= BATCH_CHARACTERS:
                batches.append(batch)
                batch, characters = [], 0
    batches.append(batch)
    start, core = time.perf_counter(), core_seconds()
    tokens = sum(len(tokens) for batch in batches for tokens in encode(batch))
    spent = {"seconds": time.perf_counter() - start, "core_seconds": core_seconds() - core}
    return spent | {"tokens": tokens}


def run_encode_batch(arguments: argparse.Namespace, work: Path, kind: str) -> dict[str, float]:
    """The library's tokenizer with the offsets of every token."""
    encode = partial(backend_of(arguments).encode_batch, add_special_tokens=False)
    return run_in_memory(arguments, work, kind, encode)


def run_encode_batch_fast(arguments: argparse.Namespace, work: Path, kind: str) -> dict[str, float]:
    """The library's tokenizer without them, as our pipeline needs it."""
    encode = partial(backend_of(arguments).encode_batch_fast, add_special_tokens=False)
    return run_in_memory(arguments, work, kind, encode)


def run_word_encoder(arguments: argparse.Namespace, work: Path, kind: str) -> dict[str, float]:
    """Our memory of words before the library's tokenizer, on one core."""
    from apex_composer.data_prep.tokens.word_encoder import make_encoder

    return run_in_memory(arguments, work, kind, make_encoder(backend_of(arguments)))


def backend_of(arguments: argparse.Namespace) -> Any:
    """The tokenizer as a worker reads it."""
    from apex_composer.data_prep.tokens.tokenizer import read_backend

    return read_backend(str(Path(arguments.tokenizer) / "tokenizer.json"))


def measure_shards(out: Path, sequence: int) -> dict[str, float]:
    """Count the tokens and bytes of all MDS shards below a folder.

    Every shard once: a split's index names again what the indices of its domains name.
    """
    shards = {}
    for index in out.rglob("index.json"):
        for shard in json.loads(index.read_text())["shards"]:
            path = index.parent / shard["raw_data"]["basename"]
            if path.is_file():
                shards[path] = shard
    tokens = sequence * sum(shard["samples"] for shard in shards.values())
    return {"tokens": tokens, "bytes": sum(s["raw_data"]["bytes"] for s in shards.values())}


def core_seconds() -> float:
    """Seconds of computing so far, of this process and of those that it has ended."""
    return sum(os.times()[:4])


SIDES = {
    "ours": run_ours,
    "llm-foundry": run_llmfoundry,
    "encode_batch": run_encode_batch,
    "encode_batch_fast": run_encode_batch_fast,
    "word-encoder": run_word_encoder,
}
