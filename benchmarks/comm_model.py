"""What APEX sends between GPUs that shard the weights, next to FSDP's own traffic: a prediction.

Per step, whatever the number of sites (apex_composer/sharding/sharded_executor.py): 4 exchanges
(all_to_all) and 1 sum (all_reduce).

    rows (axis 0)      G[N] out, T^T G[N] back to P, W[P] out, D back to N: each n x d numbers in
                       all, of which the share 1 / S stays where it is
    columns (axis 1)   nothing with FSDP2; with FSDP1 the n selected entries of every row that
                       two ranks share, at most S - 1 rows of an FSDP unit
    factors            n (p + q) numbers per site, summed over the ranks

Times follow from the bytes (which a test counts) at the given bandwidths, as if nothing overlapped.
Gradient accumulation 1, FSDP2 or FSDP1 with FULL_SHARD; FSDP gathers the weights twice and reduces
the gradients once per step.

    python benchmarks/comm_model.py --ranks 8 64 512 --network 50

Shape legend
    S   ranks that share the weights    n = p * q   indices of P, and of N    d   free axis
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from apex_composer.assessment.selection import count_selected
from apex_composer.model.flops import Flops, training_flops
from apex_composer.model.sites import Group
from apex_composer.ops.monarch import factor_pair

GIGA, RANKS_PER_NODE = 1e9, 8
EXCHANGES, SUMS = 4, 1


class SiteSize(NamedTuple):
    """What of a site counts for its traffic.

    Attributes:
        axis: 0 or 1.
        selected: n, indices of P (and as many of N).
        free: d, the length of the other axis; one more with a bias.
    """

    axis: int
    selected: int
    free: int


def step_traffic(sites: Sequence[SiteSize], ranks: int, bytes_each: int = 4) -> tuple[float, int]:
    """The bytes of one optimizer step.

    Args:
        sites: all that are expanded.
        ranks: S.
        bytes_each: size of a number, 4 for float32.

    Returns:
        What is sent to other ranks in all exchanges, by all ranks together: exact with FSDP2
        where S divides d, otherwise what FSDP1's cut rows and the padding add comes on top and
        the share that stays differs a little. And what lies in the buffer of the one sum.
    """
    rows = sum(site.selected * site.free for site in sites if site.axis == 0)
    factors = sum(site.selected * sum(factor_pair(site.selected)) for site in sites)
    return EXCHANGES * rows * (ranks - 1) / ranks * bytes_each, factors * bytes_each


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

    @property
    def flops(self) -> Flops:
        """FLOPs of training all of it."""
        sizes = {"hidden_size": self.hidden, "intermediate_size": self.channels}
        heads = {"num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads}
        whole = {"num_hidden_layers": self.layers, "vocab_size": self.vocabulary}
        return training_flops({"model_type": "llama", **sizes, **heads, **whole})

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


def predict(model: Model, ranks: int, options: argparse.Namespace) -> dict[str, str]:
    """One line of the table by its columns: bytes and times per step and rank."""
    away = (ranks - 1) / ranks
    fsdp = model.parameters * away * (2 * options.gather_bytes + options.reduce_bytes)
    exchanged, summed = step_traffic(model.sites(options.threshold), ranks)
    exchanged, summed = exchanged / ranks, 2 * away * summed  # the sum as a ring
    # One link of the chain that crosses nodes sets the pace of ring collectives.
    ring = options.network if ranks > RANKS_PER_NODE else options.nvlink
    outside = max(0, ranks - RANKS_PER_NODE) / max(1, ranks - 1)
    pairwise = exchanged * (outside / options.network + (1 - outside) / options.nvlink)
    delays = EXCHANGES * (options.latency + ranks * options.peer_latency) + SUMS * options.latency
    apex_seconds = (pairwise + summed / ring) / GIGA + delays * 1e-6
    flops = options.sequences * model.flops.of_sequence(options.length)
    compute_seconds = flops / (options.tflops * 1e12)
    return {
        "GPUs": str(ranks),
        "FSDP, GB": f"{fsdp / GIGA:.2f}",
        "exchanges, MB": f"{exchanged / 1e6:.1f}",
        "factors, MB": f"{summed / 1e6:.1f}",
        "APEX / FSDP, bytes": f"{(exchanged + summed) / fsdp:.2%}",
        "FSDP, ms": f"{1e3 * fsdp / ring / GIGA:.1f}",
        "APEX, ms": f"{1e3 * apex_seconds:.2f}",
        "compute, ms": f"{1e3 * compute_seconds:.0f}",
        "APEX / compute": f"{apex_seconds / compute_seconds:.2%}",
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[8, 64, 512], help="GPUs, 8 to a node")
    add("--threshold", type=float, default=0.125, help="share of units on each side")
    add("--sequences", type=int, default=8, help="per GPU and step")
    add("--length", type=int, default=4096, help="tokens of a sequence")
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
        lines = [predict(model, ranks, options) for ranks in options.ranks]
        table = Table(title=f"{model.name}: {model.parameters / 1e9:.2f} B parameters")
        for title in lines[0]:
            table.add_column(title, justify="right")
        for line in lines:
            table.add_row(*line.values())
        Console(width=120).print(table)
    print("Per step and GPU, sent; gradient accumulation 1. Times as if nothing overlapped.")


if __name__ == "__main__":
    main()
