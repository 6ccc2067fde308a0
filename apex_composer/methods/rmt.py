"""Random-mask tuning: random entries are trained, others in every batch."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from apex_composer.extras import needing

with needing("rmt"):
    from composer.core import State

from apex_composer.assessment.selection import seeded_generator
from apex_composer.methods.gradient_masks import GradientMask, Part
from apex_composer.methods.method_checks import check_known
from apex_composer.settings import check_not_negative


class RMT(GradientMask):
    """Trains random entries, drawn anew in every batch: gmt without its criterion.

        g <- g * m,   every entry of m is 1 with probability `share`, else 0

    What zeros in a gradient do is said at `GMT`.

    Our choices, where the papers are silent: entries are drawn one by one, so that of n entries
    share * n are kept but for about sqrt(share * (1 - share) * n); in every batch anew; gradients
    are masked before they are clipped. The draw depends on the seed, the batch's number and the
    parameter's name alone, so that any number of ranks and a resumed run have the same one. It is
    made on the parameter's device: a CPU and a GPU, or GPUs of two kinds, may draw otherwise.

    Source: the random baseline of https://arxiv.org/abs/2406.15330; 60 % in arXiv 2505.24241, A.2.

    Args:
        share: of every tensor's entries, in (0, 1). Default 0.6.
        seed: an integer of 0 or more. Default: the run's.

    Raises:
        ValueError: as `GMT`, and for a seed that is none.
        TypeError: for an unknown setting.
    """

    name = "rmt"

    def __init__(self, *, share: float = 0.6, seed: int | None = None, **unknown: Any):
        check_known("rmt", unknown, RMT)
        super().__init__(share)
        self.seed = None if seed is None else check_not_negative("rmt: seed", seed)

    def settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with its checkpoint."""
        return {**super().settings(), "seed": self.seed}

    def masks(self, parts: Sequence[Part], state: State) -> Iterator[tuple[Part, Tensor]]:
        """Random ones; every rank draws that of a whole tensor and takes its part."""
        seed = state.rank_zero_seed if self.seed is None else self.seed
        for part in parts:
            names = "rmt", state.timestamp.batch.value, part.name
            drawn = random_mask(part.total, self.share, part.gradient.device, seed, *names)
            own = drawn[part.start : part.start + part.gradient.numel()]
            yield part, own.view(part.gradient.shape)


def random_mask(
    entries: int, share: float, device: torch.device, seed: int, *names: object
) -> Tensor:
    """[entries] bool, each true with the probability `share`, by a named seed."""
    named = seeded_generator(seed, *names).initial_seed()
    generator = torch.Generator(device).manual_seed(named)
    return torch.empty(entries, dtype=torch.bool, device=device).bernoulli_(
        share, generator=generator
    )
