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

from apex_composer.data_prep.tokens.long_texts import batch_parts


def run_pipeline(
    arguments: argparse.Namespace,
    work: Path,
    kind: str,
    convert: Callable[[argparse.Namespace, Path, Path], Any],
) -> dict[str, float]:
    """A whole preparation: seconds, tokens in its shards, and their bytes."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        spent, _ = timed(lambda: convert(arguments, work / kind, Path(folder) / "out"))
        return spent | measure_shards(Path(folder), arguments.sequence)


def convert_ours(
    arguments: argparse.Namespace, texts: Path, out: Path, engine: str = "local"
) -> None:
    """Our pipeline."""
    from apex_composer.data_prep import Options, prepare

    # So many pieces that both cores have work to the end, as they do in a large job; and of few
    # documents too, or else the start of all workers but one would count as work.
    piece_bytes = (texts / "text" / "text.jsonl").stat().st_size // 64
    options = Options(sequence_length=arguments.sequence, val_tokens=None, piece_bytes=piece_bytes)
    given = {"tokenizer": arguments.tokenizer, "options": options, "workers": arguments.cores}
    prepare(texts, out, engine=engine, **given)


def run_on_ray(arguments: argparse.Namespace, work: Path, kind: str) -> dict[str, float]:
    """Our pipeline on a Ray of this machine, which the first run starts.

    Its processes are none that this one has ended, so nothing is known of their computing.
    """
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0"}
    import ray

    if not ray.is_initialized():
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
        ray.init("local", num_cpus=arguments.cores, object_store_memory=1 << 28, **quiet)
    spent = run_pipeline(arguments, work, kind, partial(convert_ours, engine="ray"))
    del spent["core_seconds"]
    return spent


def convert_with_llmfoundry(arguments: argparse.Namespace, texts: Path, out: Path) -> None:
    """llm-foundry's converter."""
    os.environ["HF_DATASETS_CACHE"] = str(out.parent)  # else the second run finds the first one's
    import datasets
    from llmfoundry.command_utils.data_prep.convert_dataset_json import convert_dataset_json
    from transformers import AutoTokenizer

    datasets.config.HF_DATASETS_CACHE = out.parent / "cache"
    convert_dataset_json(
        path=str(texts / "text"),
        out_root=str(out),
        compression=None,
        concat_tokens=arguments.sequence,
        split="train",
        tokenizer=arguments.tokenizer,
        eos_text=AutoTokenizer.from_pretrained(arguments.tokenizer).eos_token,
    )


def run_in_memory(
    arguments: argparse.Namespace, work: Path, kind: str, encode: Callable[[list[str]], list[Any]]
) -> dict[str, float]:
    """A tokenizer alone on texts in memory, in our pipeline's batches: seconds and tokens."""
    lines = (work / kind / "text" / "text.jsonl").open()
    texts = ((None, json.loads(line)["text"]) for line in lines)
    batches = [[part for _, part, _ in batch] for batch in batch_parts(texts, gives_blank=False)]
    spent, count = timed(lambda: sum(len(own) for batch in batches for own in encode(batch)))
    return spent | {"tokens": count}


def run_encode_batch_fast(arguments: argparse.Namespace, work: Path, kind: str) -> dict[str, float]:
    """The library's tokenizer without the offsets of tokens, as our pipeline needs it."""
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


def timed(call: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds of a call, and of computing by this process and those it has ended; its result."""
    start, core = time.perf_counter(), sum(os.times()[:4])
    result = call()
    seconds = {"seconds": time.perf_counter() - start, "core_seconds": sum(os.times()[:4]) - core}
    return seconds, result


SIDES = {
    "ours": partial(run_pipeline, convert=convert_ours),
    "ray": run_on_ray,
    "llm-foundry": partial(run_pipeline, convert=convert_with_llmfoundry),
    "encode_batch_fast": run_encode_batch_fast,
    "word-encoder": run_word_encoder,
}
