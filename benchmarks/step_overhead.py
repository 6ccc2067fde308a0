"""What APEX costs per training step: vanilla and APEX steps alternate in one process.

Two copies of a 4-layer, 512-wide Llama take turns on the same batches of 8 x 512 tokens, with the
assessment of every forward pass, the gradient map and the fold on one side. Prints the ratio of
step times with its spread and the time that APEX's own parts take; exits with 1 above --bound.

    python benchmarks/step_overhead.py --steps 20
"""

import argparse
import statistics
import sys
from functools import partial

import torch
from paired import command_line, ratio_text, ratios, timed, turns, write
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from apex_composer import Expander, find_sites


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
        ids = torch.randint(0, arguments.vocabulary, shape, generator=generator)
        return ids.to(arguments.device)

    def apex_step(ids: torch.Tensor) -> None:
        with expander.assessing():
            step(models["apex"], optimizers["apex"], ids)

    arms = {"vanilla": partial(step, models["vanilla"], optimizers["vanilla"]), "apex": apex_step}
    with torch.no_grad(), expander.assessing():
        models["apex"](batch())
    expander.begin_stage()
    expander.stopwatch.running = True
    seconds: dict[str, list[float]] = {"vanilla": [], "apex": [], "parts": []}
    for order in turns(models, arguments.warmup + arguments.steps):
        ids = batch()
        for name in order:
            expander.stopwatch.read()
            seconds[name].append(timed(partial(arms[name], ids)))
            if name == "apex":
                seconds["parts"].append(expander.stopwatch.read() / 1000)
    return {name: own[arguments.warmup :] for name, own in seconds.items()}


def summarise(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Medians, and the ratios pair by pair."""
    medians = {name: statistics.median(own) for name, own in seconds.items()}
    return {
        "vanilla_median_seconds": medians["vanilla"],
        "apex_median_seconds": medians["apex"],
        **ratios(seconds["apex"], seconds["vanilla"]),
        "parts_share": medians["parts"] / medians["vanilla"],
    }


def parse() -> argparse.Namespace:
    """The command line."""
    numbers = {"layers": 4, "width": 512, "heads": 8, "channels": 1376, "vocabulary": 8192}
    numbers |= {"batch": 8, "length": 512, "steps": 20, "warmup": 2, "threads": 2}
    parser = command_line(__doc__.splitlines()[0], numbers)
    parser.add_argument("--bound", type=float, default=1.02, help="exit with 1 above this ratio")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> int:
    """Measure, print, compare with the bound."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    result = summarise(measure(arguments))
    vanilla, apex = result["vanilla_median_seconds"], result["apex_median_seconds"]
    print(f"vanilla {vanilla:.4f} s, apex {apex:.4f} s")
    print(f"apex / vanilla: {ratio_text(result, 4)}")
    print(f"time inside APEX's own parts: {100 * result['parts_share']:.2f} % of a vanilla step")
    write(arguments.json, result)
    return int(result["ratio_median"] > arguments.bound)


if __name__ == "__main__":
    sys.exit(main())
