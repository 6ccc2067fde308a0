"""What APEX costs per training step: vanilla and APEX steps alternate in one process.

Two copies of a 4-layer, 512-wide Llama take turns on the same batches of 8 x 512 tokens, with the
assessment of every forward pass, the gradient map and the fold on one side. Prints the ratio of
step times with its spread and the time that APEX's own parts take; exits with 1 above --bound.

    python benchmarks/step_overhead.py --steps 20
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from apex_composer import Expander, find_sites
from apex_composer.data_prep.progress import progress_bar


def build(arguments: argparse.Namespace) -> LlamaForCausalLM:
    """The model of the issue's setting; the vocabulary is that of a small tokenizer."""
    torch.manual_seed(17)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.width,
        intermediate_size=arguments.channels,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.heads,
        max_position_embeddings=arguments.length,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(arguments.device)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    """One training step."""
    optimizer.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def timed(run, device: str) -> float:
    """Seconds of a call, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every step of both arms, and of APEX's own parts inside its steps."""
    models = {name: build(arguments) for name in ("vanilla", "apex")}
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), 1e-4) for name, model in models.items()
    }
    expander = Expander(find_sites(models["apex"]), threshold=0.125)
    expander.attach(optimizers["apex"])
    generator = torch.Generator().manual_seed(17)
    shape = (arguments.batch, arguments.length)

    def batch() -> torch.Tensor:
        return torch.randint(0, arguments.vocabulary, shape, generator=generator)

    def apex_step(ids: torch.Tensor) -> None:
        with expander.assessing():
            step(models["apex"], optimizers["apex"], ids)

    with torch.no_grad(), expander.assessing():
        models["apex"](batch().to(arguments.device))
    expander.begin_stage()
    expander.stopwatch.running = True
    seconds: dict[str, list[float]] = {"vanilla": [], "apex": [], "parts": []}
    for i in progress_bar(
        range(arguments.warmup + arguments.steps), desc="pairs of steps", delay=5
    ):
        ids = batch().to(arguments.device)
        arms = {
            "vanilla": lambda ids=ids: step(models["vanilla"], optimizers["vanilla"], ids),
            "apex": lambda ids=ids: apex_step(ids),
        }
        # Whoever comes second finds a warmer machine, so the order alternates too.
        for name in sorted(arms, reverse=i % 2 == 0):
            expander.stopwatch.read()
            elapsed = timed(arms[name], arguments.device)
            if i >= arguments.warmup:
                seconds[name].append(elapsed)
                if name == "apex":
                    seconds["parts"].append(expander.stopwatch.read() / 1000)
    return seconds


def summarise(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Ratios pair by pair, so that the machine's drift cancels."""
    ratios = [a / v for a, v in zip(seconds["apex"], seconds["vanilla"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    vanilla = statistics.median(seconds["vanilla"])
    return {
        "vanilla_median_seconds": vanilla,
        "apex_median_seconds": statistics.median(seconds["apex"]),
        "ratio_median": middle,
        "ratio_lower_quartile": low,
        "ratio_upper_quartile": high,
        "ratio_of_medians": statistics.median(seconds["apex"]) / vanilla,
        "parts_share": statistics.median(seconds["parts"]) / vanilla,
        "pairs": len(ratios),
    }


def parse() -> argparse.Namespace:
    """The command line; the defaults are the setting that the bound is given for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {
        "layers": 4,
        "width": 512,
        "heads": 8,
        "channels": 1376,
        "vocabulary": 8192,
        "batch": 8,
        "length": 512,
        "steps": 20,
        "warmup": 2,
        "threads": 2,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--bound", type=float, default=1.02, help="exit with 1 above this ratio")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args()


def main() -> int:
    """Measure, print, compare with the bound."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    result = summarise(measure(arguments))
    vanilla, apex = result["vanilla_median_seconds"], result["apex_median_seconds"]
    print(f"vanilla {vanilla:.4f} s, apex {apex:.4f} s")
    print(
        f"apex / vanilla: median {result['ratio_median']:.4f} (quartiles "
        f"{result['ratio_lower_quartile']:.4f} to {result['ratio_upper_quartile']:.4f}, "
        f"{result['pairs']} pairs), ratio of medians {result['ratio_of_medians']:.4f}"
    )
    print(f"time inside APEX's own parts: {100 * result['parts_share']:.2f} % of a vanilla step")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(result["ratio_median"] > arguments.bound)


if __name__ == "__main__":
    sys.exit(main())
