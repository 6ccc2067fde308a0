"""From the runs' metrics to the numbers that are reported."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from apex_composer.callbacks.run_facts import versions
from apex_composer.demo.documents import PRETRAIN, VALIDATION
from apex_composer.demo.from_scratch import Prepared

Numbers = dict[str, Any]


def perplexities(cross_entropy: Mapping[str, float], tokens: Mapping[str, int]) -> Numbers:
    """Turn cross entropies into perplexities.

    Args:
        cross_entropy: mean over a domain's predicted tokens, in nats per token.
        tokens: predicted tokens in a domain's validation set.

    Returns:
        `total`, exp of the mean cross entropy over all tokens of all domains, and `domains`.
    """
    mean = sum(cross_entropy[d] * tokens[d] for d in tokens) / sum(tokens.values())
    return {
        "total": math.exp(mean),
        "domains": {domain: math.exp(cross_entropy[domain]) for domain in tokens},
    }


def predicted_tokens(prepared: Prepared, sequence_length: int) -> dict[str, int]:
    """Count the predicted tokens of every domain's validation set: all but each sequence's first.

    Args:
        prepared: what the runs have read.
    """
    validation = prepared.splits[VALIDATION]
    return {domain: n["sequences"] * (sequence_length - 1) for domain, n in validation.items()}


def step_times(seconds: list[float]) -> Numbers:
    """Describe the durations of a run's batches by their quartiles.

    Args:
        seconds: duration of every batch; at least two.
    """
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}


def summarise(
    metrics: Mapping[str, Numbers], prepared: Prepared, configurations: Mapping[str, Numbers]
) -> Numbers:
    """Put everything that `summary.json` holds together.

    Args:
        metrics: numbers of the runs `base`, `vanilla` and `apex`.
        prepared: what the runs have read.
        configurations: the runs' configurations.

    Returns:
        Perplexities of the three models, the ratio of the median step times (APEX / vanilla),
        stages, seeds, versions, options, and what the data was.
    """
    apex = configurations["apex"]
    tokens = predicted_tokens(prepared, apex["max_seq_len"])
    times = {run: step_times(metrics[run]["step_seconds"]) for run in ("vanilla", "apex")}
    ppl = {f"{run}_ppl": perplexities(m["cross_entropy"], tokens) for run, m in metrics.items()}
    return {
        **ppl,
        "step_time_ratio": times["apex"]["median"] / times["vanilla"]["median"],
        "step_seconds": times,
        "run_seconds": {run: m["run_seconds"] for run, m in metrics.items()},
        "first_loss": {run: metrics[run]["loss"][0] for run in ("vanilla", "apex")},
        "stages": metrics["apex"]["stages"],
        "seeds": {
            "training": apex["seed"],
            "data_order": apex["train_loader"]["dataset"]["shuffle_seed"],
        },
        "options": apex["variables"],
        "data": _describe_data(prepared, tokens),
        "machine": {
            "device": metrics["apex"]["device"],
            "threads": metrics["apex"]["threads"],
            "precision": apex["precision"],
        },
        "versions": versions(),
    }


def _describe_data(prepared: Prepared, predicted: dict[str, int]) -> Numbers:
    trained = {split: n for split, n in prepared.splits.items() if split != VALIDATION}
    return {
        "tokenizer_sha256": prepared.tokenizer["sha256"],
        "documents": prepared.documents,
        "training_tokens": {
            split: {domain: n["tokens"] for domain, n in domains.items()}
            for split, domains in trained.items()
        },
        "predicted_validation_tokens": predicted,
        "not_evaluated": {
            domain: "training only" if domain in trained[PRETRAIN] else "too little text"
            for domain in prepared.domains
            if domain not in predicted
        },
        "held_out_are_sections": prepared.are_sections,
        "vocabulary_size": prepared.tokenizer["vocabulary_size"],
    }
