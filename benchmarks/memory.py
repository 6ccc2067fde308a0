"""Memory of training all of a model, some rows of it with APEX, and adapters, at 7B's shapes.

Each way trains some layers of LLaMA-2-7B in a process of its own, for two steps of AdamW: all in
float32; rows, and adapters (LoRA) of the same share, beside weights in bfloat16. Prints what is
trained, the bytes of weights and optimizer, and the peak that the process (CPU) or the allocator
(GPU) saw above what it held before the model was made.

    python benchmarks/memory.py --layers 2
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from paired import command_line, write
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from apex_composer import Expander, find_sites
from apex_composer.data_prep.progress import progress_bar

SHARES = {"selected": 0.024, "half": 0.52}
RANK = 64  # of LoRA: 2.4 % of LLaMA-2-7B
NUMBERS = {"layers": 2, "width": 4096, "channels": 11008, "heads": 32, "vocabulary": 512}
NUMBERS |= {"batch": 1, "length": 128}


class Adapter(nn.Module):
    """W x + B A x with W frozen (LoRA, arXiv 2106.09685)."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.linear = linear
        device = linear.weight.device
        self.a = nn.Parameter(torch.randn(rank, linear.in_features, device=device) / rank)
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """The frozen projection and the adapter's part, in the input's precision."""
        return self.linear(x) + x @ self.a.t().to(x.dtype) @ self.b.t().to(x.dtype)


def build(arguments: argparse.Namespace, dtype: torch.dtype) -> LlamaForCausalLM:
    """Layers of LLaMA-2-7B, with a vocabulary that is next to nothing beside them."""
    torch.manual_seed(17)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.width,
        intermediate_size=arguments.channels,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.heads,
        use_cache=False,
        torch_dtype=dtype,
    )
    torch.set_default_dtype(dtype)
    with torch.device(arguments.device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def train_all(arguments: argparse.Namespace) -> Callable[[], dict]:
    """Full fine-tuning: weights, gradients and both moments in float32."""
    model = build(arguments, torch.float32)
    optimizer = steps(arguments, model, torch.optim.AdamW(model.parameters(), 1e-5))
    return lambda: held(model.parameters(), model.parameters(), [optimizer])


def train_rows(arguments: argparse.Namespace, trainable: str) -> Callable[[], dict]:
    """APEX on some rows: weights in bfloat16, what is trained in float32."""
    model = build(arguments, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    share = {"trainable": trainable, "trainable_share": SHARES[trainable]}
    expander = Expander(find_sites(model), threshold=0.1875, **share)
    expander.attach(optimizer)
    with torch.no_grad(), expander.assessing():
        forward(arguments, model, 0)
    expander.begin_stage()
    steps(arguments, model, optimizer)
    copies = [part.copy for part in expander.training.parts()]
    factors = [factor for operator in expander.operators for factor in operator.factors]
    whole = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
    optimizers = [optimizer, expander.training.optimizer, expander.running._optimizer._optimizer]
    return lambda: held(
        [*model.parameters(), *copies, *factors], [*copies, *factors, *whole], optimizers
    )


def train_adapters(arguments: argparse.Namespace) -> Callable[[], dict]:
    """LoRA of rank 64 on every projection: 2.4 % of LLaMA-2-7B."""
    model = build(arguments, torch.bfloat16).requires_grad_(False)
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Adapter(child, RANK))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = steps(arguments, model, torch.optim.AdamW(trained, 1e-5))
    return lambda: held(model.parameters(), trained, [optimizer])


WAYS: dict[str, Callable[[argparse.Namespace], Callable[[], dict]]] = {
    "all, float32": train_all,
    "APEX half, 52 %": lambda arguments: train_rows(arguments, "half"),
    "APEX selected, 2.4 %": lambda arguments: train_rows(arguments, "selected"),
    "LoRA rank 64": train_adapters,
}


def forward(arguments: argparse.Namespace, model: nn.Module, seed: int) -> Tensor:
    """The loss of a batch of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (arguments.batch, arguments.length)
    ids = torch.randint(0, arguments.vocabulary, shape, generator=generator).to(arguments.device)
    with torch.autocast(torch.device(arguments.device).type, torch.bfloat16):
        return model(input_ids=ids, labels=ids).loss


def steps(
    arguments: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer
) -> torch.optim.Optimizer:
    """Two of them; after the first all memory is there."""
    for seed in (1, 2):
        forward(arguments, model, seed).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer


def held(
    weights: Iterable[Tensor], trained: Iterable[Tensor], optimizers: Iterable[Any]
) -> dict[str, int]:
    """Bytes that stay from step to step, and the number of trained parameters."""
    moments = [
        tensor
        for optimizer in optimizers
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, Tensor)
    ]
    return {
        "trained": sum(tensor.numel() for tensor in trained),
        "weights_bytes": sum(tensor.nbytes for tensor in weights),
        "optimizer_bytes": sum(tensor.nbytes for tensor in moments),
    }


def peak(device: str) -> int:
    """The most bytes so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(arguments: argparse.Namespace) -> dict[str, int]:
    """One way, in this process."""
    before = peak(arguments.device)
    found = WAYS[arguments.way](arguments)()
    return {**found, "peak_bytes": peak(arguments.device) - before}


def show(results: dict[str, dict[str, int]]) -> None:
    """The table, with ratios to the training of all."""
    table = Table("trained", "parameters", "weights", "optimizer", "ratio", "peak", "ratio")
    base = results["all, float32"]
    for way, found in results.items():
        ratios = [found[key] / base[key] for key in ("optimizer_bytes", "peak_bytes")]
        table.add_row(
            way,
            f"{found['trained']:,}",
            decimal(found["weights_bytes"]),
            decimal(found["optimizer_bytes"]),
            f"{ratios[0]:.3f}",
            decimal(found["peak_bytes"]),
            f"{ratios[1]:.3f}",
        )
    Console().print(table)


def main() -> None:
    """All ways one after the other, or one of them."""
    parser = command_line(__doc__, NUMBERS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--way", choices=WAYS, help="measure this one here, and print JSON")
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments)))
        return
    results = {}
    for way in progress_bar(list(WAYS), desc="ways", delay=5):
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[way] = json.loads(done.stdout.splitlines()[-1])
    show(results)
    settings = {name: value for name, value in vars(arguments).items() if name in NUMBERS}
    write(arguments.json, {"settings": settings, "device": arguments.device, "ways": results})


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
