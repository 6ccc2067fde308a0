"""Memory and time of phase 2's main process: which document goes where, and what a shard reads.

The documents are simulated: pieces on disk as phase 1 leaves them, but for the tokens, with the
domains in the paper's proportions, 1,000 tokens in each on average, and some copies. Budgets
for 80 % of the tokens, or all of them. Peaks are of numpy's and Python's own allocations, which
tracemalloc counts, from a second run; what a job of another size takes is extrapolated by the slope
between the fewest documents and the most.

    python benchmarks/prep_selection.py
    python benchmarks/prep_selection.py --documents 25000000 100000000 --hashes xxh3_128
"""

import argparse
import json
import tempfile
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from apex_composer.data_prep import Options
from apex_composer.data_prep.choose.document_index import make_streams, read_corpus, select
from apex_composer.data_prep.choose.job_plan import DatedSource, PieceSpan, Plan
from apex_composer.data_prep.paths import DOCUMENTS, REPORT, piece_folder
from apex_composer.data_prep.read.domains import LLAMA1
from apex_composer.data_prep.tokens.document_hash import HASH_WORDS
from apex_composer.data_prep.tokens.piece import PieceReport, document_type
from apex_composer.data_prep.tokens.tokenizer import TokenizerFacts
from apex_composer.data_prep.write.manifest import make_manifest
from apex_composer.data_prep.write.mds import ShardFormat
from apex_composer.data_prep.write.shard_writer import shard_tasks

TOKENS = 1000  # of a document, on average
COPIES = 0.05  # of the documents
PIECE_DOCUMENTS = 1 << 16
EXTRAPOLATED = 10**9
STEPS = ("read", "choose", "streams", "shards", "manifest")

Numbers = dict[str, dict[str, float]]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, nargs="+", default=[2_500_000, 10_000_000])
    parser.add_argument("--hashes", nargs="+", choices=HASH_WORDS, default=list(HASH_WORDS))
    parser.add_argument("--json", type=Path, help="file for the numbers")
    return parser.parse_args()


def make_options(documents: int, all_of_them: bool) -> Options:
    """Budgets for 80 % of the tokens, or a validation set and all that is left."""
    tokens = documents * TOKENS
    given = {"val_tokens": min(2_000_000, tokens // 20), "proportions": dict(LLAMA1)}
    if not all_of_them:
        given |= {"train_tokens": tokens * 4 // 10, "cpt_tokens": tokens * 4 // 10}
    return Options(**given)


def simulate(out: Path, documents: int, document_hash: str) -> Plan:
    """Write pieces of one domain each, in the domains' order, without tokens."""
    drawn, words = np.random.default_rng(0), HASH_WORDS[document_hash]
    copied = drawn.integers(0, 1 << 64, (1 + documents // 100, words), dtype=np.uint64)
    sources, pieces = [], []
    for domain, share in LLAMA1.items():
        left = round(documents * share / sum(LLAMA1.values()))
        while left > 0:
            rows = np.zeros(min(left, PIECE_DOCUMENTS), document_type(document_hash))
            left -= len(rows)
            rows["hash"] = drawn.integers(0, 1 << 64, rows["hash"].shape, dtype=np.uint64)
            copies = drawn.random(len(rows)) < COPIES
            rows["hash"][copies] = drawn.choice(copied, int(copies.sum()))
            rows["length"] = 1 + rows["hash"][:, 0] % (2 * TOKENS)  # a copy is as long as its text
            counts = {"documents": len(rows), "documents_tokenised": len(rows)}
            report = PieceReport(domain, len(rows), domain_names=[domain], domains={domain: counts})
            folder = piece_folder(out, len(pieces))
            folder.mkdir(parents=True)
            rows.tofile(folder / DOCUMENTS)
            (folder / REPORT).write_text(json.dumps(asdict(report)))
            sources.append(DatedSource(f"{domain}/{len(pieces)}", domain, "jsonl", 0, True, None))
            pieces.append(PieceSpan(len(pieces), 0, None))
    facts = TokenizerFacts("simulated", "", 32_000, 1, 2)
    return Plan(make_options(documents, True), facts, sources, pieces, {}, document_hash)


def measure(out: Path, plan: Plan, options: Options, traced: bool) -> dict[str, float]:
    """Seconds of every step, or the bytes that are allocated at its peak."""
    found: dict[str, float] = {}

    def step(name: str, work: Callable[[], Any]) -> Any:
        if traced:
            tracemalloc.reset_peak()
        start = time.perf_counter()
        result = work()
        found[name] = tracemalloc.get_traced_memory()[1] if traced else time.perf_counter() - start
        return result

    if traced:
        tracemalloc.start()
    corpus = step("read", lambda: read_corpus(out, plan))
    codes, wanted = step("choose", lambda: select(out, corpus, plan, options))
    streams = step("streams", lambda: make_streams(corpus, codes, wanted, options.sequence_length))
    format = ShardFormat("uint16", options.sequence_length, options.shard_bytes, None)
    step("shards", lambda: deque(shard_tasks(out, corpus, streams, format), maxlen=0))
    step("manifest", lambda: make_manifest(plan, options, corpus, codes, streams, {}, {}))
    tracemalloc.stop()
    return found


def report(name: str, results: dict[int, Numbers]) -> Numbers:
    """Print the steps' numbers for every size, and what EXTRAPOLATED documents need."""
    print(f"\n{name}\n{'documents':>14}{'':10}" + "".join(f"{step:>10}" for step in STEPS))
    for documents, numbers in results.items():
        for quantity, scale in (("bytes", documents), ("seconds", 1)):
            row = "".join(f"{numbers[quantity][step] / scale:>10.2f}" for step in STEPS)
            unit = "bytes each" if quantity == "bytes" else quantity
            print(f"{documents:>14,}{unit:>12}{row[2:]}")
    few, many = min(results), max(results)
    if few == many:
        return {}
    expected: Numbers = {}
    for quantity, most in results[many].items():
        slopes = {s: (most[s] - results[few][quantity][s]) / (many - few) for s in STEPS}
        expected[quantity] = {s: most[s] + slopes[s] * (EXTRAPOLATED - many) for s in STEPS}
    print(
        f"{EXTRAPOLATED:,} documents by the slope: {max(expected['bytes'].values()) / 1e9:.1f} GB, "
        f"{sum(expected['seconds'].values()):.0f} s"
    )
    return expected


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    found: dict[str, Any] = {}
    for name in arguments.hashes:
        results: dict[str, dict[int, Numbers]] = {"all": {}, "budgets": {}}
        for documents in arguments.documents:
            with tempfile.TemporaryDirectory(prefix="prep-selection-") as folder:
                plan = simulate(Path(folder), documents, name)
                for kind, own in results.items():
                    options = make_options(documents, kind == "all")
                    own[documents] = {
                        quantity: measure(Path(folder), plan, options, quantity == "bytes")
                        for quantity in ("seconds", "bytes")
                    }
        for kind, own in results.items():
            expected = report(f"{name}, {kind}", own)
            found[f"{name}, {kind}"] = {"measured": own, "expected": expected}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
