"""What APEX sends between GPUs that shard the weights, next to FSDP's own traffic: a prediction.

Bytes are computed (apex_composer/traffic.py; a test counts them in a run), times follow from them
at the given bandwidths, as if nothing overlapped. Gradient accumulation 1, FSDP2 or FSDP1 with
FULL_SHARD; FSDP gathers the weights twice and reduces the gradients once per step.

    python benchmarks/comm_model.py --ranks 8 64 512 --network 50
"""

import argparse
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from apex_composer.assessment.selection import count_selected
from apex_composer.model.sites import Group
from apex_composer.traffic import EXCHANGES, SUMS, SiteSize, step_traffic

GIGA, RANKS_PER_NODE = 1e9, 8


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama."""

    name: str
    layers: int
    hidden: int
    channels: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def head_dim(self) -> int:
        """Indices of one head."""
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """All of them, embeddings and norms included."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        layer = attention + 3 * self.hidden * self.channels + 2 * self.hidden
        return self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden

    def sites(self, threshold: float) -> list[SiteSize]:
        """What APEX expands of it, with `kv_heads: auto`."""

        def selected(unit: str, units: int, size: int) -> int:
            group = Group(unit, unit, units, size, probe=None)
            return size * count_selected(group, threshold, at_least_one=unit != "kv_head")

        heads = selected("head", self.heads, self.head_dim)
        kv_heads = selected("kv_head", self.kv_heads, self.head_dim)
        channels = selected("channel", self.channels, 1)
        rows = [heads, kv_heads, kv_heads, channels, channels]
        layer = [SiteSize(0, n, self.hidden) for n in rows if n]
        layer += [SiteSize(1, n, self.hidden) for n in (heads, channels)]
        return layer * self.layers


MODELS = (
    Model("TinyLLaMA-1.1B", 22, 2048, 5632, 32, 4, 32000),
    Model("Llama-2-7B", 32, 4096, 11008, 32, 32, 32000),
)


@dataclass(frozen=True)
class Prediction:
    """One line of the table; bytes and seconds per step and rank."""

    fsdp: float
    exchanged: float
    summed: float
    fsdp_seconds: float
    apex_seconds: float
    compute_seconds: float

    @property
    def share(self) -> float:
        """APEX's bytes over FSDP's."""
        return (self.exchanged + self.summed) / self.fsdp

    @property
    def overhead(self) -> float:
        """APEX's communication over a step's computation."""
        return self.apex_seconds / self.compute_seconds


def predict(model: Model, ranks: int, options: argparse.Namespace) -> Prediction:
    """Bytes and times of one step."""
    away = (ranks - 1) / ranks
    fsdp = model.parameters * away * (2 * options.gather_bytes + options.reduce_bytes)
    traffic = step_traffic(model.sites(options.threshold), ranks)
    exchanged = traffic.exchanged / ranks
    summed = traffic.sent_by_rank(ranks) - exchanged
    # One link of the chain that crosses nodes sets the pace of ring collectives.
    ring = options.network if ranks > RANKS_PER_NODE else options.nvlink
    outside = max(0, ranks - RANKS_PER_NODE) / max(1, ranks - 1)
    pairwise = exchanged * (outside / options.network + (1 - outside) / options.nvlink)
    delays = EXCHANGES * (options.latency + ranks * options.peer_latency) + SUMS * options.latency
    flops = 6 * model.parameters * options.tokens
    return Prediction(
        fsdp,
        exchanged,
        summed,
        fsdp / ring / GIGA,
        (pairwise + summed / ring) / GIGA + delays * 1e-6,
        flops / (options.tflops * 1e12),
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[8, 64, 512], help="GPUs, 8 to a node")
    add("--threshold", type=float, default=0.125, help="share of units on each side")
    add("--tokens", type=int, default=8 * 4096, help="per GPU and step")
    add("--nvlink", type=float, default=350.0, help="GB/s per GPU and direction inside a node")
    add("--network", type=float, default=40.0, help="GB/s per GPU and direction between nodes")
    add("--tflops", type=float, default=400.0, help="that training reaches per GPU")
    add("--latency", type=float, default=30.0, help="microseconds per collective")
    add("--peer-latency", type=float, default=1.0, help="microseconds per peer of an exchange")
    add("--gather-bytes", type=int, default=2, help="of a gathered weight (bf16)")
    add("--reduce-bytes", type=int, default=2, help="of a reduced gradient (PURE: 2, DEFAULT: 4)")
    return parser.parse_args()


def main() -> None:
    """Print one table per model."""
    options = parse()
    for model in MODELS:
        table = Table(title=f"{model.name}: {model.parameters / 1e9:.2f} B parameters")
        for title in (
            *("GPUs", "FSDP, GB", "exchanges, MB", "factors, MB", "APEX / FSDP, bytes"),
            *("FSDP, ms", "APEX, ms", "compute, ms", "APEX / compute"),
        ):
            table.add_column(title, justify="right")
        for ranks in options.ranks:
            line = predict(model, ranks, options)
            table.add_row(
                str(ranks),
                f"{line.fsdp / 1e9:.2f}",
                f"{line.exchanged / 1e6:.1f}",
                f"{line.summed / 1e6:.1f}",
                f"{line.share:.2%}",
                f"{1e3 * line.fsdp_seconds:.1f}",
                f"{1e3 * line.apex_seconds:.2f}",
                f"{1e3 * line.compute_seconds:.0f}",
                f"{line.overhead:.2%}",
            )
        Console(width=120).print(table)
    print("Per step and GPU, sent; gradient accumulation 1. Times as if nothing overlapped.")


if __name__ == "__main__":
    main()
