"""What does APEX cost per training step, in time and in memory, at the shape of TinyLLaMA-1.1B?

Random weights and tokens; sequences of 4096, 64 of them a step in microbatches of 4; bfloat16
autocast over float32 weights, TF32 allowed as by Composer; fused AdamW. Five arms take turns on one
model in one process: vanilla and APEX, with eager and with fused SwiGLU, APEX by torch and by
kernels. Every forward pass of APEX is assessed and every step trains operators: the most that APEX
can cost.

    python benchmarks/gpu/training_step.py --json step.json --profile missed
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import checkout
import torch
from machine import (
    choose_device,
    command_line,
    device_name,
    is_importable,
    peak_flops,
    progress_bar,
    tf32_allowed,
)
from measuring import Deadline, seconds_of
from report import Report, print_table
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

checkout.activate()

from arms import ARMS, TINYLLAMA, Training, build_model  # noqa: E402
from step_profile import write_profiles  # noqa: E402
from step_results import missed_arms, report_arms  # noqa: E402

from apex_composer.model.flops import training_flops  # noqa: E402

PROFILE = ("never", "missed", "always")


def best_attention() -> str:
    """FlashAttention 2 where it can be imported and transformers takes it, else torch's own."""
    found = is_importable("flash_attn") and is_flash_attn_2_available()
    return "flash_attention_2" if found else "sdpa"


def random_ids(options: argparse.Namespace, device: torch.device, seed: int) -> Tensor:
    """Tokens of one step, [sequences, length]."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (options.sequences, options.length)
    return torch.randint(0, options.vocabulary, shape, generator=generator, device=device)


def order_of(turn: int) -> list[str]:
    """Every arm comes at every place of a round in turn, and follows other arms in every second."""
    names = list(ARMS)
    start = turn // 2 % len(names)
    order = names[start:] + names[:start]
    return order if turn % 2 == 0 else order[::-1]


def time_arm(training: Training, name: str, ids: Tensor, microbatch: int) -> tuple[float, int]:
    """Seconds of one step of an arm, and its peak of allocated memory in bytes.

    A step of one microbatch comes before: first steps make optimizer states and address tables,
    and compile.
    """
    device = training.device
    with training.running(ARMS[name], ids) as (step, _):
        step(ids[:microbatch])
        if device.type != "cuda":
            return seconds_of(lambda: step(ids), device), 0
        torch.cuda.reset_peak_memory_stats(device)
        seconds = seconds_of(lambda: step(ids), device)
        return seconds, torch.cuda.max_memory_allocated(device)


def rounds(options: argparse.Namespace, deadline: Deadline) -> Iterator[int]:
    """Numbers of rounds until enough are done or the next one would not end in time."""
    bar = progress_bar(range(options.warmup + options.rounds), desc="rounds of all arms", delay=5)
    longest, last = 0.0, time.monotonic()
    for turn in bar:
        if not deadline.allows(longest):
            return
        yield turn
        now = time.monotonic()
        # The first one compiles, which says nothing about those after it.
        longest, last = (0.0 if turn == 0 else max(longest, now - last)), now


def measure(
    training: Training, options: argparse.Namespace, deadline: Deadline, report: Report
) -> dict[str, dict[str, list]]:
    """Seconds and peak bytes of every arm in every round, saved after each of them."""
    found = {name: {"seconds": [], "peak_bytes": []} for name in ARMS}
    report.facts["measured"] = found
    for turn in rounds(options, deadline):
        ids = random_ids(options, training.device, seed=turn)
        for name in order_of(turn):
            seconds, peak = time_arm(training, name, ids, options.microbatch)
            if turn >= options.warmup:
                found[name]["seconds"].append(seconds)
                found[name]["peak_bytes"].append(peak)
        report.save()
    return found


@tf32_allowed()
def run(device: torch.device, options: argparse.Namespace) -> Report:
    """Measure, compare, and profile where asked for.

    Args:
        device: of the model; on the CPU the times mean nothing.
        options: of `parse`.

    Raises:
        RuntimeError: if the time did not suffice for a single round.
    """
    report = Report("training_step", options.json)
    # Profiles come last: leave them time.
    deadline = Deadline(options.budget and 0.9 * options.budget)
    attention = best_attention()
    model = build_model(options, device, attention)
    flops = training_flops(model.config).of_sequence(options.length)
    training = Training(model, device, microbatch=options.microbatch, precision=options.precision)
    peak, source = peak_flops(device_name(device))
    report.facts |= {
        "options": {k: v for k, v in vars(options).items() if not isinstance(v, Path)},
        "attention": attention,
        "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops_per_token": flops / options.length,
        "peak_flops": peak,
        "peak_source": source,
    }
    found = measure(training, options, deadline, report)
    if not found["vanilla"]["seconds"]:
        raise RuntimeError("no round of all arms was completed: give it more --budget")
    tokens = options.sequences * options.length
    report_arms(report, found, tokens)
    missed = missed_arms(report) if options.profile == "missed" else list(ARMS)
    if options.profile != "never" and missed:
        ids = random_ids(options, device, seed=0)[: 2 * options.microbatch]
        write_profiles(training, missed, ids, options.profiles, report)
    report.finish()
    return report


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults are the setting that the targets are given for."""
    parser = command_line(__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default in (TINYLLAMA | {"sequences": 64, "microbatch": 4, "rounds": 12}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="number")
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of autocast")
    parser.add_argument("--profile", nargs="?", choices=PROFILE, const="always", default="never")
    parser.add_argument(
        "--profiles", type=Path, default=Path("profiles"), help="folder of the profiles"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; targets that are missed are shown, and are not an error."""
    options = parse(arguments)
    report = run(choose_device(options.device), options)
    print_table(report.lines, "training step")
    return 0


if __name__ == "__main__":
    sys.exit(main())
