"""What a step of APEX sends between ranks that share the weights: the documented bound.

Per step, whatever the number of sites (`sharded_backend.py`): 4 exchanges (all_to_all) and
1 sum (all_reduce).

    rows (axis 0)      G[N] out, T^T G[N] back to P, W[P] out, D back to N: each n x d numbers in
                       all, of which the share 1 / S stays where it is
    columns (axis 1)   nothing with FSDP2; with FSDP1 the n selected entries of every row that
                       two ranks share, at most S - 1 rows of an FSDP unit
    factors            n (p + q) numbers per site, summed over the ranks

Shape legend
    S   ranks that share the shards    n = p * q   indices of P, and of N    d   free axis
"""

from collections.abc import Iterable
from dataclasses import dataclass

from apex_composer.ops.monarch import factor_pair

EXCHANGES, SUMS = 4, 1


@dataclass(frozen=True)
class SiteSize:
    """What of a site counts for its traffic.

    Attributes:
        axis: 0 or 1.
        selected: n, indices of P (and as many of N).
        free: d, the length of the other axis; one more with a bias.
    """

    axis: int
    selected: int
    free: int

    @property
    def factor_numbers(self) -> int:
        """Numbers in L and R."""
        return self.selected * sum(factor_pair(self.selected))


@dataclass(frozen=True)
class Traffic:
    """Bytes of one step.

    Attributes:
        exchanged: sent to other ranks in all exchanges, all ranks together. Exact with FSDP2
            where S divides d, otherwise what FSDP1's cut rows and the padding add comes on top
            and the share that stays differs a little.
        summed: in the buffer of the one sum.
    """

    exchanged: float
    summed: int

    def sent_by_rank(self, ranks: int) -> float:
        """Bytes that a rank sends on average: its exchanges, and the sum as a ring."""
        return self.exchanged / ranks + 2 * (ranks - 1) / ranks * self.summed


def step_traffic(sites: Iterable[SiteSize], ranks: int, bytes_each: int = 4) -> Traffic:
    """The traffic of one optimizer step.

    Args:
        sites: all that are expanded.
        ranks: S.
        bytes_each: of a number, 4 for float32.
    """
    sites = list(sites)
    rows = sum(site.selected * site.free for site in sites if site.axis == 0)
    exchanged = EXCHANGES * rows * (ranks - 1) / ranks
    factors = sum(site.factor_numbers for site in sites)
    return Traffic(exchanged * bytes_each, factors * bytes_each)
