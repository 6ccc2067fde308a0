"""One task on one model, by lm-evaluation-harness: its numbers, and what was cut to fit."""

import time
from collections.abc import Mapping
from typing import Any

import torch

from apex_composer.evaluate.harness import quiet_harness
from apex_composer.evaluate.identity import positions_of

# The harness's own, of few-shot examples and of sampling.
SEEDS = {
    "random_seed": 0,
    "numpy_random_seed": 1234,
    "torch_random_seed": 1234,
    "fewshot_random_seed": 1234,
}


def wrap_model(model: Any, tokenizer: Any, batch_size: int, max_length: int | None) -> Any:
    """The harness's view of a Hugging Face model that is loaded already.

    Args:
        model: a causal language model.
        tokenizer: the model's.
        batch_size: sequences at once.
        max_length: tokens of a prompt with its answer; None: the model's positions.

    Returns:
        An LM of the harness; `cut` counts requests whose prompt lost its beginning to fit. It takes
        the softmax in float32 at least, where the harness takes that of the logits: a sum of
        -100 nats in bfloat16 is a multiple of 0.5, and the likeliest answer one of many.
    """
    from lm_eval.models.huggingface import HFLM

    class CountingLM(HFLM):
        cut = 0

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> Any:
            self.cut += sum(
                len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests
            )
            return super()._loglikelihood_tokens(requests, *args, **options)

        def generate_until(self, requests: Any, *args: Any, **options: Any) -> Any:
            for request in requests:
                context, settings = request.args
                room = self.max_length - settings.get("max_gen_toks", self.max_gen_toks)
                self.cut += len(self.tok_encode(context)) > room
            return super().generate_until(requests, *args, **options)

    with quiet_harness():
        return CountingLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length or positions_of(model.config),
            softmax_dtype=torch.promote_types(model.dtype, torch.float32),
        )


def run_task(
    model: Any,
    manager: Any,
    group: Any,
    *,
    limit: int | None,
    run_code: bool,
    chat: bool,
) -> dict[str, Any]:
    """Evaluate a model on a task.

    Args:
        model: from `wrap_model`.
        manager: from `harness.find_tasks`.
        group: from `harness.build_task`.
        limit: documents of each leaf task; None: all.
        run_code: whether tasks that run what the model writes may do so.
        chat: whether prompts take the form of the tokenizer's chat template.

    Returns:
        metrics: value and standard error (None where the harness has none) by `metric,filter`.
        parts: the same of each leaf task, where there are several.
        documents: those evaluated.
        requests: prompts with an answer, or to be answered.
        cut_prompts: those of them that lost their beginning.
        seconds: duration.
    """
    from lm_eval import simple_evaluate

    cut, start = model.cut, time.monotonic()
    with quiet_harness():
        found = simple_evaluate(
            model,
            tasks=[group],
            limit=limit,
            confirm_run_unsafe_code=run_code,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            log_samples=False,
            task_manager=manager,
            **SEEDS,
        )
    tasks = group.get_all_tasks()
    parts = {task.task_name: read_metrics(found["results"][task.task_name]) for task in tasks}
    whole = found.get("groups", {}).get(group.name)
    return {
        "metrics": read_metrics(whole) if whole else parts[tasks[0].task_name],
        **({"parts": parts} if whole else {}),
        "documents": sum(found["n-samples"][name]["effective"] for name in parts),
        "requests": sum(len(task.instances) * task.config.repeats for task in tasks),
        "cut_prompts": model.cut - cut,
        "seconds": round(time.monotonic() - start, 1),
    }


def read_metrics(found: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Value and standard error of each metric in the harness's results of a task."""
    metrics = {}
    for name, value in found.items():
        metric, comma, which = name.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = found.get(f"{metric}_stderr,{which}")
        metrics[name] = {
            "value": float(value),
            "stderr": float(error) if isinstance(error, int | float) else None,
        }
    return metrics
